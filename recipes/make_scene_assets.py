"""Make the source images of the embedded scenes: emoji sprites, handwritten digits, background photographs.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    pip install 'scikit-learn==1.9.1' 'scikit-image==0.26.0'
    python recipes/make_scene_assets.py --emoji package

Writes `sprites.png`, `digits.npz` and `backgrounds.jpg`, as the lists `sprites.json` and `backgrounds.json` in the
package say: what each picture shows, and which split may show it. No emoji, no handwritten sample and no photograph is
in two splits; kinds have several images of the same kind of thing, so that a model can learn the kind and not the
picture.
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from himap_train.embedded.scenes import ASSETS, SPRITE

BACKGROUND = 96
DIGIT_SPLIT = {"train": 1300, "validation": 150, "test": 347}


def make_sprites(emoji: Path, out: Path) -> None:
    """Scale the listed emoji to one sheet, in the order of the list."""
    tiles: list[Image.Image] = []
    for row in json.loads((ASSETS / "sprites.json").read_text()):
        picture = Image.open(emoji / "img/google/64" / row["file"]).convert("RGBA")
        tiles.append(picture.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))
    columns = 16
    sheet = Image.new("RGBA", (columns * SPRITE, -(-len(tiles) // columns) * SPRITE))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * SPRITE, index // columns * SPRITE))
    sheet.save(out / "sprites.png", optimize=True)


def make_digits(out: Path) -> None:
    """scikit-learn's 1797 handwritten digits, 8x8, 16 grey levels, shuffled once and cut into the splits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    ends = np.cumsum(list(DIGIT_SPLIT.values()))
    arrays: dict[str, np.ndarray] = {}
    for split, part in zip(DIGIT_SPLIT, np.split(order, ends[:-1]), strict=True):
        arrays[f"{split}_images"] = data.images[part].astype(np.uint8)
        arrays[f"{split}_labels"] = data.target[part].astype(np.uint8)
        arrays[f"{split}_source"] = part.astype(np.int16)
    np.savez_compressed(out / "digits.npz", allow_pickle=False, **arrays)


def make_backgrounds(out: Path) -> None:
    """Random square crops of the listed photographs, which ship inside scikit-image, side by side."""
    from skimage import data

    rng = np.random.default_rng(0)
    rows = json.loads((ASSETS / "backgrounds.json").read_text())
    sheet = Image.new("RGB", (BACKGROUND * len(rows), BACKGROUND))
    for index, row in enumerate(rows):
        photo = Image.fromarray(getattr(data, row["photo"])()).convert("RGB")
        side = int(rng.integers(min(photo.size) // 3, min(photo.size) * 2 // 3))
        left, top = int(rng.integers(photo.width - side)), int(rng.integers(photo.height - side))
        crop = photo.crop((left, top, left + side, top + side))
        sheet.paste(crop.resize((BACKGROUND, BACKGROUND), Image.Resampling.LANCZOS), (index * BACKGROUND, 0))
    sheet.save(out / "backgrounds.jpg", quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="unpacked npm package emoji-datasource-google 16.0.0")
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    if not (args.emoji / "img/google/64").is_dir():
        raise FileNotFoundError(
            f"no img/google/64 in {args.emoji}; give the unpacked npm package emoji-datasource-google 16.0.0"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    make_sprites(args.emoji, args.out)
    make_digits(args.out)
    make_backgrounds(args.out)


if __name__ == "__main__":
    main()
