"""model -> scores. What a model does with held-out pictures, clips and words, and a report to look at."""

from emulus.evaluate.answers import Answers, answers
from emulus.evaluate.bars import Bar, bars
from emulus.evaluate.bounds import Bounds, bounds
from emulus.evaluate.choice import Accuracy, Choice, Ranks, choose, make_groups
from emulus.evaluate.curves import curves_of
from emulus.evaluate.evaluate import EvaluateConfig, evaluate, held_out_examples, measure, training_items
from emulus.evaluate.galleries import GalleryCounts, galleries
from emulus.evaluate.held_out import Example, encode_examples
from emulus.evaluate.likelihood import BitsPerId, Likelihood, Part, likelihood
from emulus.evaluate.reconstruction import CodecQuality, Quality, Reconstruction, reconstruct
from emulus.evaluate.report import Curves, Figure, Figures, Gallery, Report, Section, Shot, Text, Tile, write_report
from emulus.evaluate.summary import Measurements, bars_section, figures_section
from emulus.evaluate.sweeps import SweepConfig, Sweeps, sweeps

__all__ = [
    "Accuracy",
    "Answers",
    "Bar",
    "BitsPerId",
    "Bounds",
    "Choice",
    "CodecQuality",
    "Curves",
    "EvaluateConfig",
    "Example",
    "Figure",
    "Figures",
    "Gallery",
    "GalleryCounts",
    "Likelihood",
    "Measurements",
    "Part",
    "Quality",
    "Ranks",
    "Reconstruction",
    "Report",
    "Section",
    "Shot",
    "SweepConfig",
    "Sweeps",
    "Text",
    "Tile",
    "answers",
    "bars",
    "bars_section",
    "bounds",
    "choose",
    "curves_of",
    "encode_examples",
    "evaluate",
    "figures_section",
    "galleries",
    "held_out_examples",
    "likelihood",
    "make_groups",
    "measure",
    "reconstruct",
    "sweeps",
    "training_items",
    "write_report",
]
