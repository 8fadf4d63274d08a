"""BLEU, ROUGE-L, CIDEr-D, METEOR and the reward equal the Java-based tools."""

import gzip
import json
import math
import multiprocessing
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_metrics import (
    CiderD,
    CiderReward,
    JavaMissing,
    PTBTokenizer,
    bleu,
    java_metrics,
    meteor,
    rouge_l,
    score_captions,
    spice,
)
from caption_metrics.captions import ngram_words

GOLDEN = Path(__file__).parent / "golden" / "metrics"
TOLERANCE = 1e-9
REPOSITORY = Path(__file__).parent.parent


def golden(name):
    with gzip.open(GOLDEN / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def slow_cider_d(hypothesis, references, documents):
    """CIDEr-D written down plainly: words in, one number out; `documents` are lists of captions."""

    def counts(words):
        return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))

    frequency = Counter(ngram for captions in documents for ngram in {g for words in captions for g in counts(words)})

    def vector(words, n):
        return {
            ngram: count * (math.log(len(documents)) - math.log(max(1, frequency[ngram])))
            for ngram, count in counts(words).items()
            if len(ngram) == n
        }

    total = 0.0
    for reference in references:
        penalty = math.exp(-((max(0, len(hypothesis) - 1) - max(0, len(reference) - 1)) ** 2) / (2 * 6.0**2))
        for n in range(1, 5):
            ours, theirs = vector(hypothesis, n), vector(reference, n)
            product = sum(
                min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs
            )
            norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
            total += penalty * product / norm if norm else 0.0
    return 10 * total / 4 / len(references)


@pytest.mark.parametrize("name", ["fakecap", "heldout", "edge"])
def test_golden_scores_from_raw_captions(name):
    rows = golden(f"scores_{name}")
    corpus = json.loads((GOLDEN / "scores_corpus.json").read_text())[name]
    hypotheses, references = [row["hyp"] for row in rows], [row["refs"] for row in rows]
    found = {f"Bleu_{n}": score for n, score in enumerate(bleu(hypotheses, references), start=1)}
    found |= {"ROUGE_L": rouge_l(hypotheses, references), "CIDEr": CiderD().score(hypotheses, references)}
    for metric, score in found.items():
        close(score.corpus, corpus[metric])
        close(score.per_image, [row["scores"][metric] for row in rows])


def test_tokens_give_the_scores_of_their_captions():
    rows = golden("scores_edge")
    tokenizer = PTBTokenizer()
    captions = [row["hyp"] for row in rows], [row["refs"] for row in rows]
    tokens = list(map(tokenizer.tokenize, captions[0])), list(map(tokenizer.tokenize_batch, captions[1]))
    assert score_captions(*captions, per_image=True) == score_captions(*tokens, per_image=True)


words = st.lists(st.sampled_from(["a", "b", "c", "d", "e\xa0f", "\xad"]), max_size=9)
groups = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=4)), min_size=1, max_size=5)


@given(groups)
@settings(deadline=None, max_examples=80)
def test_cider_d_equals_its_plain_form(images):
    def split(tokens):
        return " ".join(tokens).split()

    documents = [[split(reference) for reference in references] for _, references in images]
    scores = CiderD().score([hypothesis for hypothesis, _ in images], [references for _, references in images])
    for (hypothesis, _), references, score in zip(images, documents, scores.per_image, strict=True):
        assert score == pytest.approx(slow_cider_d(split(hypothesis), references, documents), abs=TOLERANCE)


@given(words, words)
@settings(deadline=None, max_examples=80)
def test_rouge_l_counts_the_longest_common_subsequence(one, other):
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, word in enumerate(one):
        for k, candidate in enumerate(other):
            table[i + 1, k + 1] = table[i, k] + 1 if word == candidate else max(table[i, k + 1], table[i + 1, k])
    common = table[-1, -1] or int(not one and not other)  # two empty captions share their emptiness
    precision, recall = common / max(1, len(one)), common / max(1, len(other))
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision) if common else 0.0
    assert rouge_l([one], [[other]]).corpus == pytest.approx(expected, abs=TOLERANCE)


@pytest.fixture(scope="module")
def corpus():
    return [row["captions"] for row in golden("scst_corpus")]


@pytest.fixture(scope="module")
def batches():
    return [(row, [row["refs"][i // 5] for i in range(50)]) for row in golden("scst_batches")]


@pytest.mark.parametrize("document", ["caption", "image"])
def test_golden_rewards(document, corpus, batches, tmp_path):
    reward = CiderReward.from_captions(corpus, document=document, corpus="2,000 images of COCO")
    reward.save(tmp_path / "df.safetensors")
    loaded = CiderReward.load(tmp_path / "df.safetensors")
    assert (loaded.document, loaded.corpus, loaded.signature) == (document, reward.corpus, reward.signature)
    for row, references in batches:
        found = reward.reward(row["hyps"], references)
        assert found.dtype == np.float64
        close(found, row[f"reward_df_{document}"])
        np.testing.assert_array_equal(loaded.reward(row["hyps"], references), found)


def test_counting_eos_punishes_a_caption_that_breaks_off():
    captions = [["a man with a dog", "a man with his dog"], ["a cat on a mat", "the cat sits on a mat"]]
    with_eos = CiderReward.from_captions(captions, count_eos=True)
    without = CiderReward.from_captions(captions)
    assert without.signature == "NO<EOS>+Cider-D[n4,s6.0]+document[caption]"
    assert with_eos.signature == "STANDARD_wInit+Cider-D[n4,s6.0]+document[caption]"
    cut, whole = ["a man with a"], ["a man with a dog"]
    loss = [r.reward(whole, captions[:1]) - r.reward(cut, captions[:1]) for r in (without, with_eos)]
    assert loss[1] > loss[0]
    documents = [[(*caption.split(), "<eos>")] for image in captions for caption in image]
    references = [(*caption.split(), "<eos>") for caption in captions[0]]
    expected = slow_cider_d(("a", "man", "with", "a", "<eos>"), references, documents)
    close(with_eos.reward(cut, captions[:1]), [expected])


def test_rewards_are_the_same_in_every_thread_and_process(corpus, batches, tmp_path):
    reward = CiderReward.from_captions(corpus, corpus="x")
    reward.save(tmp_path / "one.safetensors")
    expected = [reward.reward(row["hyps"], references) for row, references in batches]
    found = [None] * 4

    def work(number):
        found[number] = [reward.reward(row["hyps"], references) for row, references in batches]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(scores, expected) for scores in found)

    (tmp_path / "corpus.json").write_text(json.dumps(corpus))
    code = (
        "import json, sys; from caption_metrics import CiderReward;"
        "CiderReward.from_captions(json.load(open(sys.argv[1])), corpus='x').save(sys.argv[2])"
    )
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, tmp_path / "corpus.json", tmp_path / f"{seed}.safetensors"]
        subprocess.run(command, check=True, cwd=REPOSITORY, env={"PYTHONHASHSEED": seed, "PATH": ""})
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "1", "2")]
    assert files[0] == files[1] == files[2]


def test_a_reward_can_be_sent_to_another_process(corpus, batches):
    reward = CiderReward.from_captions(corpus, document="image", corpus="x")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        row, references = batches[0]
        there = pool.apply(reward.reward, (row["hyps"], references))
    np.testing.assert_array_equal(there, reward.reward(row["hyps"], references))


def test_a_look_up_does_not_grow_the_table(corpus, batches):
    reward = CiderReward.from_captions(corpus)
    before = reward.frequencies.nbytes, len(reward.frequencies.words), len(reward.frequencies.word_numbers)
    reward.reward(["a word neverseenbefore"] * 3, [["neverseenbefore stands here"]] * 3)
    assert before == (reward.frequencies.nbytes, len(reward.frequencies.words), len(reward.frequencies.word_numbers))


def test_references_kept_are_bounded(corpus):
    reward = CiderReward.from_captions(corpus[:50])
    small = CiderReward(reward.frequencies, cached_captions=10)
    for captions in corpus:
        small.reward(captions[:1], [captions])
    assert small._reference.cache_info().currsize == 10


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        (["a"], [], "1 hypotheses and 0 lists"),
        ([], [], "no captions"),
        (["a"], [[]], r"references\[0\] must be a list"),
        (["a", "b"], [["a"], "b"], r"references\[1\] must be a list"),
        ("a", ["a"], "not one string"),
        ([3], [["a"]], r"hypotheses\[0\] must be a string"),
        (["a"], [["a", None]], r"references\[0\]\[1\] must be a string"),
    ],
)
@pytest.mark.parametrize("metric", [bleu, rouge_l, CiderD().score, score_captions])
def test_mistakes_are_named(metric, hypotheses, references, message):
    with pytest.raises(ValueError, match=message):
        metric(hypotheses, references)


def test_mistakes_in_the_reward_are_named(tmp_path):
    reward = CiderReward.from_captions([["a dog"], ["a cat"]])
    with pytest.raises(ValueError, match="2 and 1"):
        reward.reward(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"references\[1\]"):
        reward.reward(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match=r"references\[0\] must be a list"):
        reward.reward(["a"], [[["a"]]])
    with pytest.raises(ValueError, match="must be a string"):
        reward.reward([None], [["a"]])
    with pytest.raises(ValueError, match="no captions"):
        CiderReward.from_captions([])
    with pytest.raises(ValueError, match="is a string"):
        CiderReward.from_captions(["a dog"])
    with pytest.raises(ValueError, match="document must be"):
        CiderReward.from_captions([["a"]], document="corpus")
    (tmp_path / "bad").write_bytes(b"\x80\x04no safetensors")
    with pytest.raises(ValueError, match="bad is no file written by"):
        CiderReward.load(tmp_path / "bad")
    assert reward.reward([], []).shape == (0,)


def test_empty_captions_have_a_score():
    scores = score_captions(["", "a dog"], [["", "."], ["a dog"]], per_image=True)
    assert scores["per_image"]["cider_d"][0] == 0
    assert scores["per_image"]["rouge_l"] == [1.0, pytest.approx(1.0)]
    assert all(math.isfinite(scores[name]) for name in scores if name != "per_image")


def java_is_there():
    try:
        java_metrics._java()
        java_metrics._program("meteor", "meteor-1.5.jar")
    except JavaMissing as missing:
        return str(missing)
    return None


@pytest.mark.skipif(java_is_there() is not None, reason=str(java_is_there()))
@pytest.mark.parametrize(
    ("name", "locale"),
    [
        ("edge", "de_DE.UTF-8"),
        pytest.param("fakecap", "C", marks=pytest.mark.slow),
        pytest.param("heldout", "C", marks=pytest.mark.slow),
    ],
)
def test_golden_meteor(name, locale, monkeypatch):
    monkeypatch.setenv("LC_ALL", locale)
    # For where that locale is not installed: what Java makes of it.
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE" if locale != "C" else "")
    corpus = json.loads((GOLDEN / "scores_corpus.json").read_text())
    rows = golden(f"scores_{name}")
    found = meteor([row["hyp"] for row in rows], [row["refs"] for row in rows])
    close(found.corpus, corpus[name]["METEOR"])
    close(found.per_image, [row["scores"]["METEOR"] for row in rows])


def test_without_java_the_other_metrics_go_on(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="install Java"):
        scores = score_captions(["a dog"], [["a dog"]], with_meteor=True, with_spice=True)
    assert scores["meteor"] is scores["spice"] is None
    assert scores["rouge_l"] == pytest.approx(1.0)
    for metric in (meteor, spice):
        with pytest.raises(JavaMissing, match=r"pip install pycocoevalcap|pycocoevalcap\.spice"):
            metric(["a dog"], [["a dog"]])


@pytest.mark.parametrize(
    "tokens", [["a", "dog"], ["10\xa01/2", "cups"], ["", "a"], [], ("a", "dog"), ["a", "b\u3000c"]]
)
def test_words_of_ngrams_are_those_of_the_joined_caption(tokens):
    assert ngram_words(tokens) == " ".join(tokens).split()


def test_no_letter_or_digit_is_a_space():
    characters = map(chr, range(sys.maxunicode + 1))
    assert not [each for each in characters if each.isalnum() and each.split() != [each]]
