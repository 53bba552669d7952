"""prompts -> ids. Requests are decoded together; events tell what has become whole."""

from __future__ import annotations

from emulus.engine.engine import Engine
from emulus.engine.request import Counts, Done, Event, Failed, Frame, Request, Result, Row, TextPiece, Token
from emulus.engine.schedule import Jacobi, Schedule, Sequential, Zipar

__all__ = [
    "Counts",
    "Done",
    "Engine",
    "Event",
    "Failed",
    "Frame",
    "Jacobi",
    "Request",
    "Result",
    "Row",
    "Schedule",
    "Sequential",
    "TextPiece",
    "Token",
    "Zipar",
]
