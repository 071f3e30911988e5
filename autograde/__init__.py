"""Turns lesson sources into notebooks, and runs, proves and grades them. Knows nothing of language models."""

import sys

# jsonschema, which nbformat imports, builds a grammar of internationalised addresses for seconds on import where this
# optional package is installed. No schema used here asks for one; marked absent, it costs nothing.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
