"""From texts to answers: how an answer is read, how one is chosen, and what a run returns.

Start with ``result`` (``Answers``). ``reading`` extracts the answer of a text, ``selectors`` choose one answer from
many particles, ``ancestry`` is the genealogy of the particles, and ``notices`` are the warnings of a run.
"""

from probinfer.lm.answers.reading import canonical, last_boxed, last_number, text

__all__ = ["canonical", "last_boxed", "last_number", "text"]
