"""Recipes: how a value is made again, with other arrays in its slots.

A recipe is called with a kitchen. What may hold itself (a function that calls itself, a list inside itself) is made
empty and filled afterwards, so that every cycle finds the one new object.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

__all__ = ["Again", "Keep", "Kitchen", "Make", "Recipe", "Slot", "Walking", "cook"]


class Kitchen:
    """The arrays of one making, what is made so far by its number, and what is still to be filled."""

    __slots__ = ("arrays", "made", "todo")

    def __init__(self, arrays: Sequence[Any]):
        self.arrays = arrays
        self.made: dict[int, Any] = {}
        self.todo: list[Callable[[], Any]] = []


class Keep:
    """The value itself; ``fixed`` says that it is installed code or a constant, which nothing changes."""

    __slots__ = ("fixed", "value")

    def __init__(self, value: Any, fixed: bool = False):
        self.value, self.fixed = value, fixed

    def __call__(self, kitchen: Kitchen) -> Any:
        """Make the value."""
        return self.value


class Slot:
    """An array that belongs to the data."""

    __slots__ = ("index",)
    fixed = False

    def __init__(self, index: int):
        self.index = index

    def __call__(self, kitchen: Kitchen) -> Any:
        """Make the value."""
        return kitchen.arrays[self.index]


class Again:
    """A value met before, by its number; its recipe may still be in the making."""

    __slots__ = ("number", "recipes")
    fixed = False

    def __init__(self, number: int, recipes: dict[int, Any]):
        self.number, self.recipes = number, recipes

    def __call__(self, kitchen: Kitchen) -> Any:
        """Make the value."""
        if self.number in kitchen.made:
            return kitchen.made[self.number]
        return self.recipes[self.number](kitchen)


class Make:
    """A new object: ``create(kitchen)`` makes it, ``fill(kitchen, made)`` completes it when all are created."""

    __slots__ = ("create", "fill", "number")
    fixed = False

    def __init__(self, number: int, create: Callable, fill: Callable | None = None):
        self.number, self.create, self.fill = number, create, fill

    def __call__(self, kitchen: Kitchen) -> Any:
        """Make the value."""
        if self.number not in kitchen.made:
            made = kitchen.made[self.number] = self.create(kitchen)
            if self.fill is not None:
                fill = self.fill
                kitchen.todo.append(lambda: fill(kitchen, made))
        return kitchen.made[self.number]


Recipe = Keep | Slot | Again | Make


class Walking(abc.ABC):
    """What the visitors of functions and objects ask of the walk, which is ``walk.Walk``.

    Attributes:
        slots: whether recipes are wanted; otherwise the walk only hashes.
        in_class: whether the walk is inside a class, whose content is hashed where it stands.
        unseen: what could not be read, in words.
        live: what recipes hand on without copying, although it could change.
        fresh: numbers of new objects that stand for no one value.
        bare: functions without the attributes that are written to them, by the id of the function.
    """

    slots: bool
    in_class: bool
    unseen: list[str]
    live: list[Any]
    fresh: count[int]
    bare: dict[int, Any]

    @abc.abstractmethod
    def feed(self, *words: Any) -> None:
        """Let words or bytes enter the hash."""

    @abc.abstractmethod
    def itself(self, value: Any) -> None:
        """Let an object enter by itself, because it is written to; for a store it is nothing."""

    @abc.abstractmethod
    def visit(self, value: Any) -> Recipe:
        """Hash a value and return the recipe for it."""

    @abc.abstractmethod
    def inside(self, visit: Any, value: Any) -> Recipe:
        """Visit a value with everything in it captured."""

    @abc.abstractmethod
    def slot(self, array: Any, kind: tuple[str, str]) -> Recipe:
        """A slot for an array of this kind."""

    @abc.abstractmethod
    def content(self) -> AbstractContextManager[None]:
        """Within: arrays are hashed with their bytes."""

    @abc.abstractmethod
    def class_digest(self, kind: type) -> str:
        """The digest of a user's class by itself."""


def cook(recipe: Recipe, arrays: Sequence[Any]) -> Any:
    """Make the value with these arrays in its slots."""
    kitchen = Kitchen(arrays)
    value = recipe(kitchen)
    while kitchen.todo:
        kitchen.todo.pop()()
    return value
