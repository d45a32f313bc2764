"""``python -m probinfer`` is the command ``probinfer``."""

from probinfer.app.command_line import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
