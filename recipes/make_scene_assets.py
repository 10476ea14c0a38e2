"""Make the source images of the embedded scenes: emoji sprites, handwritten digits, background photographs.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    pip install 'scikit-learn==1.9.1' 'scikit-image==0.26.0'
    python recipes/make_scene_assets.py --emoji package

Writes `sprites.png`, `sprites.json`, `digits.npz`, `backgrounds.jpg` and `backgrounds.json`. What each split may show
is decided here: no emoji, no handwritten sample and no photograph is in two splits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPRITE = 32  # pixels; scenes draw them at 24 to 30
BACKGROUND = 96
SPLITS = ("train", "validation", "test")

# Emoji short names for train | validation | test. Kinds with several images of the same kind of thing, so that a
# model can learn the kind and not the picture.
EMOJI = {
    "face": "grinning grin joy smiley smile sweat_smile wink blush slightly_smiling_face yum relieved pensive"
    " heart_eyes sunglasses smirk neutral_face worried cry rolling_on_the_floor_laughing sleeping"
    " kissing_heart kissing open_mouth confused flushed | expressionless nerd_face disappointed | unamused"
    " no_mouth laughing stuck_out_tongue",
    "cat": "smile_cat joy_cat heart_eyes_cat smirk_cat crying_cat_face cat | kissing_cat scream_cat | smiley_cat"
    " pouting_cat",
    "monkey": "see_no_evil monkey_face | hear_no_evil | speak_no_evil",
    "heart": "blue_heart yellow_heart purple_heart black_heart white_heart grey_heart pink_heart heart |"
    " brown_heart light_blue_heart | green_heart orange_heart",
    "sign": "aries taurus gemini cancer leo virgo capricorn pisces | libra ophiuchus | scorpius sagittarius aquarius",
    "car": "car taxi pickup_truck minibus ambulance | police_car | blue_car",
    "moon": "new_moon first_quarter_moon moon full_moon waning_crescent_moon new_moon_with_face"
    " full_moon_with_face | last_quarter_moon | waning_gibbous_moon waxing_crescent_moon",
    "book": "ledger notebook notebook_with_decorative_cover closed_book blue_book | orange_book | green_book",
    "cloud": "cloud mostly_sunny partly_sunny rain_cloud lightning | partly_sunny_rain thunder_cloud_and_rain |"
    " barely_sunny snow_cloud",
    "clock": "clock1 clock3 clock5 clock6 clock8 clock10 clock12 clock130 clock330 clock430 clock630 clock730"
    " clock930 clock1130 | clock2 clock7 clock11 clock530 clock1030 | clock4 clock9 clock230 clock830"
    " clock1230",
    "arrow": "arrow_upper_left arrow_lower_right arrow_right arrow_up arrow_down left_right_arrow"
    " leftwards_arrow_with_hook arrow_heading_up | arrow_upper_right arrow_left arrow_up_down |"
    " arrow_lower_left arrow_right_hook arrow_heading_down",
    "mailbox": "mailbox_closed mailbox_with_mail | mailbox | mailbox_with_no_mail",
}
# Photographs that ship inside scikit-image, by split, with the number of square crops taken from each.
PHOTOS = {
    "train": ("grass", "brick", "coffee", "chelsea"),
    "validation": ("rocket",),
    "test": ("gravel", "astronaut"),
}
CROPS = 4
DIGIT_SPLIT = {"train": 1300, "validation": 150, "test": 347}


def make_sprites(emoji: Path, out: Path) -> None:
    """Scale the chosen emoji to one sheet; `sprites.json` lists class, split, name and source file in sheet order."""
    by_name: dict[str, dict[str, Any]] = {e["short_name"]: e for e in json.loads((emoji / "emoji.json").read_text())}
    rows: list[dict[str, str]] = []
    tiles: list[Image.Image] = []
    for kind, names in EMOJI.items():
        for split, part in zip(SPLITS, names.split("|"), strict=True):
            for name in part.split():
                file = by_name[name]["image"]
                rows.append({"kind": kind, "split": split, "name": name, "file": file})
                picture = Image.open(emoji / "img/google/64" / file).convert("RGBA")
                tiles.append(picture.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))
    columns = 16
    sheet = Image.new("RGBA", (columns * SPRITE, -(-len(tiles) // columns) * SPRITE))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * SPRITE, index // columns * SPRITE))
    sheet.save(out / "sprites.png", optimize=True)
    (out / "sprites.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


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
    """Square crops of photographs, side by side; `backgrounds.json` lists split and photograph in sheet order."""
    from skimage import data

    rng = np.random.default_rng(0)
    rows: list[dict[str, str]] = []
    tiles: list[Image.Image] = []
    for split, names in PHOTOS.items():
        for name in names:
            photo = Image.fromarray(getattr(data, name)()).convert("RGB")
            for _ in range(CROPS):
                side = int(rng.integers(min(photo.size) // 3, min(photo.size) * 2 // 3))
                left, top = int(rng.integers(photo.width - side)), int(rng.integers(photo.height - side))
                crop = photo.crop((left, top, left + side, top + side))
                tiles.append(crop.resize((BACKGROUND, BACKGROUND), Image.Resampling.LANCZOS))
                rows.append({"split": split, "photo": name})
    sheet = Image.new("RGB", (BACKGROUND * len(tiles), BACKGROUND))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index * BACKGROUND, 0))
    sheet.save(out / "backgrounds.jpg", quality=85)
    (out / "backgrounds.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="unpacked npm package emoji-datasource-google 16.0.0")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "himap_train/assets/scenes")
    args = parser.parse_args()
    if not (args.emoji / "emoji.json").is_file():
        raise FileNotFoundError(
            f"no emoji.json in {args.emoji}; give the unpacked npm package emoji-datasource-google 16.0.0"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    make_sprites(args.emoji, args.out)
    make_digits(args.out)
    make_backgrounds(args.out)


if __name__ == "__main__":
    main()
