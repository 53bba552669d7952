"""model -> scores. Reconstruction, likelihood and choice on held-out data, and a report to look at."""

from emulus.evaluate.choice import Accuracy, Choice, choose, make_groups
from emulus.evaluate.curves import curves_of
from emulus.evaluate.evaluate import EvaluateConfig, evaluate, held_out_examples, measure, training_items
from emulus.evaluate.galleries import GalleryCounts, galleries
from emulus.evaluate.held_out import Example, encode_examples
from emulus.evaluate.likelihood import BitsPerId, Likelihood, Part, likelihood
from emulus.evaluate.reconstruction import CodecQuality, Quality, Reconstruction, reconstruct
from emulus.evaluate.report import Curves, Figure, Figures, Gallery, Report, Section, Shot, Text, Tile, write_report
from emulus.evaluate.summary import Measurements, figures_section

__all__ = [
    "Accuracy",
    "BitsPerId",
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
    "Reconstruction",
    "Report",
    "Section",
    "Shot",
    "Text",
    "Tile",
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
    "training_items",
    "write_report",
]
