"""Language models."""

__all__: list[str] = []
