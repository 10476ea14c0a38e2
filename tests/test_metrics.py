"""Every metric against examples worked out by hand from its definition."""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch
from processes import in_processes

from himap_train.evaluation.captions import CIDEr, words
from himap_train.evaluation.choice import (
    CircularChoice,
    MultipleChoice,
    StrictChoice,
    extract_letter,
    options_of,
    read_reference,
    strict_letter,
)
from himap_train.evaluation.metrics import METRICS, make_metrics
from himap_train.evaluation.sample_metric import mean_and_standard_error
from himap_train.evaluation.text import ANLS, GQA, ExactMatch, RelaxedAccuracy, anls_score, relaxed_match
from himap_train.evaluation.vqa import TextVQAAccuracy, VQAAccuracy, normalise, vqa_score
from himap_train.evaluation.yes_no import MME, POPE, mme_answer, pope_answer
from himap_train.processes import from_all


def fill(metric, cases, clusters=None):
    """`cases`: (prediction, answers, type or meta) each."""
    predictions, answers, kinds = zip(*cases, strict=True)
    meta = [kind if isinstance(kind, dict) else {"type": kind} for kind in kinds]
    metric.update(predictions, answers, meta, [str(i) for i in range(len(cases))], clusters)
    return metric


def figures(metric):
    return metric.figures(metric.rows())


def test_exact_match_overall_and_per_type():
    cases = [
        (" Cat. ", ["cat"], "place"),
        ("dog", ["cat"], "place"),
        ("two", ["2", "two"], "count"),
        ("", ["no"], "exist"),
    ]
    found = figures(fill(ExactMatch(), cases))
    assert found == {"exact": 0.5, "exact/count": 1.0, "exact/exist": 0.0, "exact/place": 0.5}


def test_gqa_ignores_case_and_punctuation():
    assert figures(fill(GQA(), [("T-shirt.", ["tshirt"], "q"), ("left of", ["left"], "q")]))["gqa"] == 0.5


@pytest.mark.parametrize("metric", [ExactMatch, GQA])
def test_the_same_letters_are_the_same_however_they_are_encoded(metric):
    cases = [("cafe\u0301", ["caf\u00e9"], ""), ("cafe", ["caf\u00e9"], "")]
    assert list(figures(fill(metric(), cases)).values()) == [0.5]


# ---- VQA ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat!", "cat"),
        ("Two dogs, a man", "2 dogs man"),  # the comma stands before a space: it goes
        ("black/white", "black white"),  # between letters a mark becomes a space
        ("1,000 men/women", "1000 menwomen"),  # a comma between digits makes every mark go without a space
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes missing: not in the official list
        ("2.5", "2.5"),
        ("no. 1.", "no 1"),  # the typo in the official pattern: a full stop after a digit goes too
        ("zero\nnone", "0 0"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert normalise(text) == expected


def test_vqa_accuracy_leaves_out_each_annotator_in_turn():
    # Two of ten said "cat". Leaving one of the two out: 1/3 (twice); leaving another out: 2/3 (eight times).
    assert vqa_score("cat", ["cat"] * 2 + ["dog"] * 8) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    # Three of ten: 2/3 three times, full seven times: 0.9. Four of ten is full.
    assert vqa_score("cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx(0.9)
    assert vqa_score("cat", ["cat"] * 4 + ["dog"] * 6) == 1.0
    assert vqa_score("cow", ["cat"] * 4 + ["dog"] * 6) == 0.0


@pytest.mark.parametrize("metric", [VQAAccuracy, TextVQAAccuracy])
def test_vqa_refuses_fewer_answers_than_can_make_a_right_one_right(metric):
    assert list(figures(fill(metric(), [("cat", ["cat"] * 4, "")])).values()) == [1.0]
    with pytest.raises(ValueError, match=r"found 3.*at least 4.*exact"):
        fill(metric(), [("cat", ["cat"] * 3, "")])


def test_vqa_metric_normalises_both_sides():
    answers = ["a cat"] * 3 + ["the Dog"] * 7
    assert figures(fill(VQAAccuracy(), [("The cat.", answers, "q"), ("dog", answers, "q")]))["vqa"] == pytest.approx(
        0.95
    )


def test_textvqa_splits_words_first():
    # VQA: the comma between letters becomes a space. TextVQA takes it away before that.
    case = [("red,blue", ["redblue"] * 10, "q")]
    assert figures(fill(VQAAccuracy(), case))["vqa"] == 0.0
    assert figures(fill(TextVQAAccuracy(), case))["textvqa"] == 1.0


# ---- yes / no ----


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no, it does not", "no"),
        ("There is not a dog. Yes.", "no"),
        ("There is a dog. No cat.", "yes"),  # only the first sentence
        ("None of them", "yes"),  # not one of the words
        ("NO", "yes"),  # the published parser knows No and no only
        ("No, there", "no"),
    ],
)
def test_pope_parser(text, answer):
    assert pope_answer(text) == answer


def test_pope_figures():
    # random: said yes yes no no, truth yes no yes no -> tp 1 fp 1 fn 1 tn 1; popular: said yes yes, truth yes yes
    said_true = [("Yes", "yes"), ("Yes", "no"), ("No", "yes"), ("No", "no")]
    cases = [(said, [true], "random") for said, true in said_true] + [("Yes", ["yes"], "popular")] * 2
    found = figures(fill(POPE(), cases))
    assert found["pope_accuracy"] == pytest.approx(4 / 6)
    assert found["pope_precision"] == pytest.approx(3 / 4)
    assert found["pope_recall"] == pytest.approx(3 / 4)
    assert found["pope_f1"] == pytest.approx(3 / 4)
    assert found["pope_yes_ratio"] == pytest.approx(4 / 6)
    assert found["pope_f1/random"] == pytest.approx(0.5)
    assert found["pope_f1_mean_of_splits"] == pytest.approx((0.5 + 1.0) / 2)


def test_pope_yes_ratio_is_that_of_the_predictions():
    found = figures(fill(POPE(), [("No", ["yes"], ""), ("No", ["no"], "")]))
    assert found["pope_yes_ratio"] == 0.0
    assert found["pope_f1"] == found["pope_precision"] == found["pope_recall"] == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes.", "yes"), ("no", "no"), ("  No, it", "no"), ("I do not", "other"), ("Not", "no"), ("", "other")],
)
def test_mme_parser(text, answer):
    assert mme_answer(text) == answer


def test_mme_accuracy_plus_needs_both_questions_of_an_image():
    cases = [("yes", ["Yes"], "count"), ("no", ["No"], "count"), ("yes", ["yes"], "count"), ("maybe", ["no"], "count")]
    cases += [("no", ["yes"], "code_reasoning"), ("no", ["no"], "code_reasoning")]
    found = figures(fill(MME(), cases, clusters=["a", "a", "b", "b", "c", "c"]))
    assert found["mme_acc/count"] == 75.0
    assert found["mme_acc_plus/count"] == 50.0
    assert found["mme_perception"] == 125.0
    assert found["mme_cognition"] == 50.0


def test_yes_no_metrics_refuse_other_references():
    with pytest.raises(ValueError, match="'cat' is neither yes nor no"):
        fill(POPE(), [("yes", ["cat"], "q")])
    with pytest.raises(ValueError, match="'yes' or 'no' is neither yes nor no"):
        fill(MME(), [("yes", ["yes", "no"], "q")])


# ---- text ----


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("abcd", ["abxy"], 0.5),  # two of four wrong: exactly the threshold, counts
        ("abc", ["axy"], 0.0),  # one third similar: below
        ("hello", ["hallo"], 0.8),
        ("HELLO  world", ["hello world"], 1.0),
        ("x", ["hello", "x"], 1.0),  # the best reference
        ("", [""], 1.0),
    ],
)
def test_anls(prediction, answers, expected):
    assert anls_score(prediction, answers) == pytest.approx(expected)


def test_anls_of_a_long_answer_in_another_place():
    """A search along a beam finds no short way where much was put in before."""
    answer = "the total amount due is $1,234.56 payable to Acme Holdings before June 30, 2019."
    before = "According to the invoice shown in the picture it says that the following holds: "
    assert anls_score(before + answer, [answer]) == pytest.approx(0.5)
    rng = random.Random(0)
    for _ in range(200):
        one, other = ("".join(rng.choices("abc ", k=rng.randrange(12))) for _ in range(2))
        distance = _slow_distance(" ".join(one.split()), " ".join(other.split()))
        similarity = 1 - distance / (max(len(one), len(other)) or 1)
        assert anls_score(one, [other]) == pytest.approx(similarity if similarity >= 0.5 else 0.0)


def _slow_distance(one: str, other: str) -> int:
    """By its definition."""
    if not (one and other):
        return len(one + other)
    same = _distance(one[1:], other[1:]) + (one[0] != other[0])
    return min(same, 1 + _distance(one[1:], other), 1 + _distance(one, other[1:]))


_distance = functools.cache(_slow_distance)


def test_anls_divides_by_the_raw_length():
    # Distance 1 after collapsing "a  b" to "a b"; the raw text has four characters: 1 - 1/4, not 1 - 1/3.
    assert anls_score("a  b", ["a c"]) == pytest.approx(0.75)
    assert figures(fill(ANLS(), [("hello", ["hallo"], ""), ("", ["hallo"], "")]))["anls"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("prediction", "answer", "match"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("-95", "-100", True),
        ("10.4%", "0.1", True),  # 0.104 is 4 % off
        ("10", "10%", False),
        ("0.0", "0", False),  # target 0: equality of the strings
        ("0", "0", True),
        ("Red ", "red", True),
        ("1e2", "100", True),
        ("many", "100", False),
        ("infinity", "Infinity", True),  # words
        ("nan", "NaN", True),
        ("5", "1e999", False),
    ],
)
def test_relaxed(prediction, answer, match):
    assert relaxed_match(prediction, answer) is match
    assert figures(fill(RelaxedAccuracy(), [(prediction, [answer], "human")]))["relaxed/human"] == float(match)


# ---- multiple choice ----

OPTIONS = {"A": "a cat", "B": "a dog", "C": "a dog and a cat"}


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("B) yes", "B"),
        ("The answer is B", "B"),
        ("A dog is here now", ""),  # an article, and "a dog" is contained, but so is no other text: see below
        ("B or C", ""),
        ("a dog", "B"),
        ("a dog and a cat", "C"),  # contains the other two, but is this one
        ("It shows a dog", "B"),
        ("D", ""),
        ("", ""),
        ("Bats", ""),
        # the whole answer is a letter or starts with one
        ("b", "B"),
        ("(b)", "B"),
        ("b) a dog", "B"),
        ("**B**", "B"),
        ("B\nbecause of its ears", "B"),
        ("A, because it meows", "A"),
        ("(A) or (B)", ""),
        ("A, B", ""),
        # "answer is", "option"
        ("The answer is A.", "A"),
        ("the answer is b", "B"),
        ("the answer is a dog", "B"),
        ("The answer is A dog", "B"),
        ("The correct answer is option (b).", "B"),
        ("Answer: C", "C"),
        ("The answer is: **B**", "B"),
        ("Option A is right, if you ask me", "A"),
        ("The answer is A. The answer is B.", ""),
        ("answer a question", ""),
        ("Option A is wrong. The answer is B.", "B"),
        ("Option A: yes. Option C: no. The answer is B.", "B"),
        ("The answer is I think B", "B"),  # I is no option
        ("The answer is A or B", ""),
        ("the answer is (a), (b)", ""),
        ("The answer is A, I think", "A"),
        # what is refused is not named
        ("A is wrong", ""),
        ("(A) is wrong, (B) is right", "B"),
        ("The answer is not (A)", ""),
        ("Not option A. B.", "B"),
        ("It isn’t A", ""),
        ("It is not a dog.", ""),
        # as Chinese writes them
        ("（Ｂ）", "B"),
        ("Ｂ．a dog", "B"),
        # a letter by itself
        ("It can only be A.", "A"),
        ("A is what I think", "A"),
        ("I would say (b) fits", "B"),
        ("The right one is not B", ""),
        ("A and B", ""),
        ("a B-52 and a C's", ""),
        # the text of the longest
        ("a dog and a cat are here", "C"),
        ("Some dogma dog", ""),
    ],
)
def test_extract_letter(prediction, letter):
    expected = "B" if prediction == "A dog is here now" else letter
    assert extract_letter(prediction, OPTIONS) == expected


@pytest.mark.parametrize(
    ("prediction", "options", "letter"),
    [
        ("Vitamin C", ["Vitamin C", "Vitamin D", "Vitamin A"], "A"),
        ("It is vitamin C.", ["Vitamin C", "Vitamin D", "Vitamin A"], "A"),
        ("The answer is Vitamin C.", ["Vitamin C", "Vitamin D", "Vitamin A"], "A"),
        ("C: Vitamin A", ["Vitamin C", "Vitamin D", "Vitamin A"], "C"),
        ("The answer is C, Vitamin A", ["Vitamin C", "Vitamin D", "Vitamin A"], "C"),
        ("A dog", ["cat", "dog"], "B"),
        ("it is dark red", ["red", "dark red"], "B"),
        ("a woman", ["man", "woman"], "B"),
        ("2", ["1", "2", "12"], "B"),
        ("It has 12 legs", ["1", "2", "12"], "C"),
        ("It has 1.5 legs", ["1", "2", "12"], ""),
        ("the same", ["the same", "the same"], ""),
        ("A. Lincoln", ["T. Edison", "A. Lincoln"], "B"),  # the whole answer is a text before it starts with a letter
        ("A", ["C", "A"], "A"),  # but a letter alone is one
        ("C", ["C", "A"], "A"),  # if an option has it
        ("", ["", "a dog"], ""),
        ("It is not vitamin B", ["vitamin B", "vitamin C"], ""),
    ],
)
def test_letters_inside_the_text_of_an_option_are_that_option(prediction, options, letter):
    assert extract_letter(prediction, dict(zip("ABC", options, strict=False))) == letter


@pytest.mark.parametrize(
    ("reference", "options", "letter"),
    [
        ("b", OPTIONS, "B"),
        ("(b)", OPTIONS, "B"),
        ("B.", OPTIONS, "B"),
        ("A dog.", OPTIONS, "B"),
        ("1", OPTIONS, "B"),
        ("1", {"A": "1", "B": "2"}, "A"),  # the text of an option before the number of one
        ("25", {}, "Z"),
        ("3", OPTIONS, ""),
        ("the dog", OPTIONS, ""),
        ("The answer is B", OPTIONS, ""),
        ("", OPTIONS, ""),
        ("1.0", OPTIONS, ""),
    ],
)
def test_references_are_read_exactly(reference, options, letter):
    assert read_reference(reference, options) == letter


def test_options_in_a_list():
    assert options_of({"choices": '["a cat", "a dog"]', "type": "x"}) == {"A": "a cat", "B": "a dog"}
    assert options_of({"options": "[broken"}) == {}
    assert options_of({"options": '[{"A": "a cat", "(B)": 2, "C": null, "note": "x"}]'}) == {"A": "a cat", "B": "2"}


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("B. a dog", "B"),
        ("B.", ""),
        ("b", ""),
        ("(B)", ""),
        ("AB", ""),
        ("", ""),
        ("a dog", ""),
        ("The answer is B.", "B"),
        ("So: The answer is B because", "B"),
        ("The answer is B", ""),  # the script wants a character after the letter
        ("the answer is B.", ""),
        ("The answer is A. The answer is B.", ""),
        ("The answer is A. The answer is A.", ""),
        ("D", ""),  # there are three options
        ("D. x. The answer is B.", ""),  # the first rule has decided
        ("F. x. The answer is B.", "B"),  # F is no letter of an option
    ],
)
def test_strict_choice_reads_as_llavas_script(prediction, letter):
    assert strict_letter(prediction, OPTIONS) == letter
    if letter:
        assert figures(fill(StrictChoice(), [(prediction, [letter], OPTIONS)])) == {"choice-strict": 1.0}


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("答案是B", "B"), ("选B", "B"), ("选择B。", "B"), ("正确答案是A。", "A"), ("我认为是A", "A"), ("A猫", "A"),
        ("这是猫", "B"), ("答案是猫", "B"), ("不是猫", ""), ("不是B,是C", "C"), ("B是错的,选D", "D"), ("A和B都对", ""),
        ("猫,富含维生素C", "B"), ("这是猫,A级", "B"), ("是T恤", "D"), ("T恤", "D"), ("一辆黑色自行车", ""),
    ],
)  # fmt: skip
def test_letters_and_texts_beside_characters_without_spaces(prediction: str, letter: str) -> None:
    """MMBench's Chinese half: neighbours are words of their own."""
    assert extract_letter(prediction, {"A": "狗", "B": "猫", "C": "鸟", "D": "T恤"}) == letter


def test_extract_letter_without_options():
    assert extract_letter("C.", {}) == "C"
    assert extract_letter("I think it is D", {}) == "D"
    assert extract_letter("nothing", {}) == ""
    assert extract_letter("The answer is I think B", {}) == "B"
    assert extract_letter("The answer is I.", {}) == "I"


def test_multiple_choice_takes_letter_or_text_as_reference():
    cases = [("A", ["A"], OPTIONS | {"type": "ai2d"}), ("A", ["a dog"], OPTIONS), ("(C)", ["C"], {})]
    assert figures(fill(MultipleChoice(), cases))["choice"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="'a cow' names no option"):
        fill(MultipleChoice(), [("A", ["a cow"], OPTIONS)])


def test_circular_needs_every_rotation():
    # Question 7: right under both rotations. Question 8: wrong under one of three. MMBench numbers rotations by steps
    # of a million.
    right, wrong = ("A", ["A"]), ("A", ["B"])
    indices = [(right, 7), (right, 8), (right, 1_000_007), (wrong, 1_000_008), (right, 2_000_008)]
    metric = fill(CircularChoice(), [(*case, {"index": str(i), "type": "t" + str(i % 10)}) for case, i in indices])
    assert figures(metric) == {"circular": 0.5, "circular/t7": 1.0, "circular/t8": 0.0}
    assert metric.summary()[0].count == 2
    with pytest.raises(ValueError, match="question_id"):
        fill(CircularChoice(), [(*right, {})])


# ---- statistics and accumulation ----


def test_standard_error_of_independent_samples_is_the_binomial_one():
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0])
    mean, error = mean_and_standard_error(scores, torch.arange(4))
    assert mean == 0.75
    assert error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # p (1 - p) / (n - 1)


def test_standard_error_of_whole_clusters_counts_clusters_not_samples():
    # Ten copies of each of four values say no more than the four values.
    scores, clusters = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.arange(4)
    once = mean_and_standard_error(scores, clusters)
    ten_times = mean_and_standard_error(scores.repeat(10), clusters.repeat(10))
    assert ten_times == pytest.approx(once)
    assert math.isnan(mean_and_standard_error(scores, torch.zeros(4))[1])
    with pytest.raises(ValueError, match="no sample"):
        mean_and_standard_error(torch.zeros(0), torch.zeros(0))


def test_a_repeated_key_is_counted_once():
    metric = ExactMatch()
    metric.update(["cat", "dog"], [["cat"], ["cat"]], [{}, {}], ["1", "2"])
    metric.update(["cat", "cat"], [["cat"], ["cat"]], [{}, {}], ["1", "3"])
    assert figures(metric)["exact"] == pytest.approx(2 / 3)
    assert metric.summary()[0].count == 3
    with pytest.raises(ValueError, match="no sample was scored"):
        ExactMatch().summary()


# ---- captions ----


def test_cider_is_that_of_the_coco_code():
    """Numbers of pycocoevalcap 1.2 with its Java tokenizer."""
    references = [
        ["A man's dog sits on a red bike.", "The dog is on the bike!", "A dog (brown) on a bicycle"],
        ["Two cats sleep on the couch.", "Two cats lying on a couch"],
        ["A woman isn't riding a horse.", "a woman rides a horse near a fence", "Woman on horse"],
    ]
    captions = ["a dog on a red bike", "Two cats sleep on a bed", "zebra"]
    metric = CIDEr()
    metric.update(captions, references, [{"type": "a"}, {"type": "b"}, {"type": "b"}], ["0", "1", "2"])
    overall, by_type = metric.summary()
    assert overall.score == pytest.approx(2.022691397438342)
    assert by_type["a"].score == pytest.approx(2.22947352)
    assert figures(metric)["cider"] == pytest.approx(2.022691397438342)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog isn't here, it's on a T-shirt.", "a man 's dog is n't here it 's on a t-shirt"),
        ("1,000 people -- in the U.S. & (can't)...", "1,000 people in the u.s. & -lrb- ca n't -rrb-"),
        ("Don’t walk! At 10:30 a.m., 50% off; Dr. Who", "do n't walk at 10:30 a.m. 50 % off dr. who"),
    ],
)
def test_words_are_those_of_the_java_tokenizer(text, expected):
    assert " ".join(words(text)) == expected


def test_metrics_by_name():
    assert [metric.name for metric in make_metrics(["pope", "exact"])] == ["pope", "exact"]
    assert len(METRICS) == 13
    with pytest.raises(ValueError, match="unknown metric .'exakt'.; choose from exact, gqa"):
        make_metrics(["exakt"])
    with pytest.raises(ValueError, match="at least one"):
        make_metrics([])


def test_rows_of_several_processes_are_joined():
    """Three ranks share an image of MME, one sample is answered by two of them, the last rank has none at all."""

    def on_each_rank():
        metric = MME()
        mine = {0: [0, 2, 4], 1: [1, 3, 0], 2: []}[torch.distributed.get_rank()]
        said = ["yes", "no", "yes", "yes", "yes"]
        answers, meta = [[("yes", "no")[i % 2]] for i in mine], [{"type": "count"}] * len(mine)
        metric.update([said[i] for i in mine], answers, meta, [str(i) for i in mine], ["abc"[i // 2] for i in mine])
        metric.join(from_all(metric))
        return metric.summary()[0].count, figures(metric)

    for count, values in in_processes(3, on_each_rank):
        assert count == 5
        assert values["mme_acc/count"] == pytest.approx(80.0)  # four of five right: sample 3 is wrong
        assert values["mme_acc_plus/count"] == pytest.approx(200 / 3)  # a and c, whose questions lie on different ranks


def test_cider_of_several_processes_is_that_of_all_captions():
    cases = [("a dog", ["a dog runs"], "a"), ("a cat", ["a cat sits", "one cat"], "b"), ("a cow", ["a red cow"], "b")]
    alone = figures(fill(CIDEr(), cases))

    def joined():
        rank = torch.distributed.get_rank()
        metric = CIDEr()
        for number, (said, answers, kind) in list(enumerate(cases))[rank::2]:
            metric.update([said], [answers], [{"type": kind}], [str(number)])
        metric.join(from_all(metric))
        return figures(metric)

    assert in_processes(2, joined) == [alone, alone]


def test_answers_that_nobody_scores_have_no_number():
    metric = make_metrics(["none"])[0]
    metric.update(["a"], [[]], [{}], ["0"])
    assert math.isnan(metric.summary()[0].score)
