"""What the pages of commands and of the demo are made of: fits side by side, their scores, pictures and sentences.

Start with ``sections``; ``engines`` is the one table of the library's engines.
"""
