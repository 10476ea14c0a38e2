"""Where image tokens lie in their picture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenBlock:
    """Consecutive image tokens that lie in a grid over a part of the picture, row by row from the top left.

    Attributes:
        rows: Rows of the grid.
        columns: Columns of the grid.
        box: The part: left, top, right and bottom as fractions of the picture's width and height. A grid over padding
            goes beyond 0 or 1.
        before: Tokens before the grid that show no part of it (a class token).
        row_end: Tokens at the end of each row that show no part of it (a newline).
        view: Blocks of one view lie beside each other; an overview and its tiles are two views of one picture.
    """

    rows: int
    columns: int
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    before: int = 0
    row_end: int = 0
    view: str = "picture"

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.before + self.rows * (self.columns + self.row_end)

    @property
    def placeless(self) -> int:
        """Those that show no part of the picture."""
        return self.before + self.rows * self.row_end

    def patch(self, token: int) -> int | None:
        """Number of the grid's patch that a token of this block shows; None for one that shows none."""
        if token < self.before:
            return None
        row, column = divmod(token - self.before, self.columns + self.row_end)
        return row * self.columns + column if column < self.columns else None
