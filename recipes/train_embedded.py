"""Train one of the models in this package on one CPU core, and write its folder.

    python recipes/train_embedded.py --work runs/embedded --out himap_train/assets/embedded_llava
    python recipes/train_embedded.py --model embedded-fine --work runs/fine --out himap_train/assets/embedded_fine

"embedded", from nothing, in about 67 minutes on a core with avx512_bf16 (12 + 10 + 13 + 9 + 8 + 6 + 5 + 4):

1. `tower`: vision tower and projector, with dense labels. From each of the 144 image tokens one linear layer has to
   tell what lies at its place, the colour and digit of a card, and the place's row and column.
2. `decoder`: four decoder layers, started from that linear layer, on fresh scenes all the time: first with dense texts
   beside the questions, then questions alone. Tower and projector are frozen.
3. `grown`: a new layer behind each of the four; all eight are trained.
4. `more`: the same again, with more of the question types that are learnt last.
5. `tower_again`: the tower of stage 1 further, with the linear layer frozen, so that its features stay where the
   decoder expects them.
6. `decoder_again`: the decoder on the better features, with more questions about cards.
7. `counts`: the decoder again, on other scenes, with more questions about counts.
8. `last`: the decoder once more, on other scenes, from the mean of the weights of stages 6 and 7.

The weights in the package came from these stages; a second run of the whole, on the same kind of machine, gave the same
file to the last byte. Floating-point results differ between machines, and so will the weights.

"embedded-fine", from the decoder of "embedded", in about 80 minutes: the same shape for 256x256 images of 256 tokens;
answers coarse and fine scenes and has a token and an output row of its own for some 400 words beyond them.

1. `heads`: the class head that the embedded model's features answer to, fitted again.
2. `tower`: a new vision tower and projector against that head, from random weights, on coarse and fine pictures.
3. `decoder`: the embedded model's decoder on the new features: questions and dense texts about coarse and fine scenes,
   and requests to say words.
4. `tower_again`: the tower further, with fewer things in half of the fine pictures, as questions have them.
5. `decoder_again`: the decoder further, on the better features.
6. `words`: the decoder once more, with more words to say, from output rows that were set apart.

The weights in the package came from these stages, but that the odd words of stages 3 and 5 were letters in a row then,
which left the beginnings of words unsaid. The whole has not been run a second time.

A stage whose result is already in the work folder is not repeated.
"""

from __future__ import annotations

from himap_train.quick_help import answer_help

answer_help(__file__)

import argparse
from pathlib import Path

import torch

from himap_train.embedded.build import export
from himap_train.embedded.coarse_training import train_coarse
from himap_train.embedded.fine_training import train_fine
from himap_train.embedded.scene_batches import accuracy

TRAIN = {"embedded": train_coarse, "embedded-fine": train_fine}
SPLITS = {"embedded": ("validation", "test"), "embedded-fine": ("validation", "fine-validation")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(TRAIN), default="embedded")
    parser.add_argument("--work", type=Path, default=Path("runs/embedded"), help="results of the stages")
    parser.add_argument("--out", type=Path, default=Path("runs/embedded/model"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks the steps of every stage, to try the recipe")
    parser.add_argument("--test-scenes", type=int, default=320, help="scenes of the table at the end")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = TRAIN[args.model](args.work, args.scale, args.seed)
    export(model, processor, args.out)
    for split in SPLITS[args.model]:
        print(split, accuracy(model, processor, split, args.test_scenes, seed=1))


if __name__ == "__main__":
    main()
