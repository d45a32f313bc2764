"""From texts to answers: how an answer is read, how one is chosen, and what a run returns.

Start with ``result`` (``Answers``). ``selectors`` choose one answer from many particles, ``ancestry`` says who descends
from whom, ``notices`` what went wrong in a run that went on.
"""

from probinfer.lm.answers.reading import canonical, last_boxed, last_number, text

__all__ = ["canonical", "last_boxed", "last_number", "text"]
