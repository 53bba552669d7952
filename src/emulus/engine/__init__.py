"""prompts -> ids. Requests are decoded together; events tell what has become whole."""

from __future__ import annotations

from emulus.engine.engine import Engine
from emulus.engine.request import Done, Event, Frame, Request, Result, Row, TextPiece, Token

__all__ = ["Done", "Engine", "Event", "Frame", "Request", "Result", "Row", "TextPiece", "Token"]
