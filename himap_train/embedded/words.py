"""Words beyond the scenes: the fine model learns to say each of them, so that others can teach it new answers."""

from __future__ import annotations

import string
from collections.abc import Sequence

from numpy.random import Generator

# Everyday words of other people's questions and answers; a token each in the fine model's tokenizer.
EXTRA_WORDS = tuple(
    """
    Say
    black white grey gray pink brown gold silver dark light bright colours color
    circle square triangle star cross line ring box round long short big small large tiny wide thin thick shape size
    one two three four five six seven eight nine ten eleven twelve zero first second third last half none some more
    less most all both each every other another same different only also very not but or and if then so because
    up down front back behind under over near far side corner edge inside outside between next beside north south
    east west here
    man woman boy girl child person people baby hand head eye ear nose mouth hair arm leg foot body
    dog horse cow sheep pig bird fish bear lion tiger elephant mouse rabbit duck chicken snake frog bee spider
    tree flower grass leaf forest mountain river sea lake beach sky sun rain snow wind fire water stone sand ground
    house door window wall roof room kitchen table chair bed lamp street road bridge city park school shop garden
    bus train plane boat ship bike truck wheel engine station airport
    apple banana bread milk cheese egg meat rice soup cake sugar salt coffee tea juice bottle cup plate knife fork
    shirt shoe hat coat dress bag phone computer screen keyboard camera paper pen letter picture map money coin ball
    game music film
    day night morning evening hour minute week month year time today winter summer spring autumn
    old new young good bad hot cold warm wet dry clean dirty open closed full empty fast slow high low hard
    soft happy sad true false right wrong easy ready
    do does did has have had can could will would be was were been make take give put go come see look show find
    hold sit stand walk run eat drink play read write say tell ask answer question option correct choose word name
    number text title page chart value total average amount price date percent figure graph bar axis
    who when why whose which it its this that these those he she they we you I my your their his her from to for by
    about into out off after before during without
    """.split()
)


def copying(words: Sequence[str], rng: Generator) -> tuple[str, str]:
    """A request to say one to four words, and the words. Every third is the beginning of one with letters behind it.

    Every beginning of a word is a token of the tokenizer, and unknown words are made of these: so each gets its turn.
    """

    def word() -> str:
        chosen = words[int(rng.integers(len(words)))]
        if rng.random() < 2 / 3:
            return chosen
        letters = rng.choice(list(string.ascii_letters + string.digits), size=int(rng.integers(0, 4)))
        return chosen[: 1 + int(rng.integers(len(chosen)))] + "".join(letters)

    said = " ".join(word() for _ in range(int(rng.integers(1, 5))))
    return f"Say {said}.", said
