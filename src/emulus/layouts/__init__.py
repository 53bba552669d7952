"""a checkpoint's folder, in any published layout <-> configs, vocabulary, tensors under our names."""

from emulus.layouts.contents import Contents, Layout, inspect_folder, read_text, with_vision
from emulus.layouts.conversion import Converted, convert
from emulus.layouts.write import write_folder

__all__ = ["Contents", "Converted", "Layout", "convert", "inspect_folder", "read_text", "with_vision", "write_folder"]
