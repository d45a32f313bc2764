"""A function is what it computes: the content identity of callables, objects and arrays.

A user's function depends on its code, its constants and defaults, its closure, the object behind it, the globals that
it reads, the helpers and classes outside installed packages, and the values of the arrays and tables among these. All
of it is read when the function is handed in. Installed code enters with its name and version.
"""

from probinfer.core.identity.functions import is_settled
from probinfer.core.identity.objects import Known
from probinfer.core.identity.structure import Structure, refresh_classes, structure_of
from probinfer.core.identity.walk import Walk

__all__ = ["Known", "Structure", "Walk", "is_settled", "refresh_classes", "structure_of"]
