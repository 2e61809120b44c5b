"""Files of predictions and references: ours both ways, others' as they are, and what is refused with its line."""

import json

import pytest

from vlmfast.errors import DataError
from vlmfast.eval.predictions import (
    Prediction,
    Truth,
    group_means,
    read_predictions,
    read_references,
    with_references,
    write_predictions,
)

WHOLE = [
    Prediction(
        id="17",
        task="vqa",
        input={"question": "Wie viele Äpfel?", "candidates": ["two", "one"]},
        prediction="two",
        probs={"two": 0.75, "one": 0.25},
        references=("two", "2"),
        group="count",
        meta={"model": "m", "seed": 3},
    ),
    Prediction(id="a", prediction="", score=0.5),
    Prediction(id="b", prediction="a line\nand one that only looks like it\u2028"),
]


@pytest.fixture
def file(tmp_path):
    """Writes rows one a line, or what is given as text, and gives the path."""

    def write(content, name="preds.jsonl"):
        path = tmp_path / name
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "preds.jsonl"
    write_predictions(path, iter(WHOLE))
    assert read_predictions(path) == WHOLE
    assert len(path.read_text(encoding="utf-8").split("\n")) == 4
    write_predictions(path, WHOLE[:1])
    assert read_predictions(path) == WHOLE[:1]
    assert [each.name for each in tmp_path.iterdir()] == ["preds.jsonl"]


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "preds.jsonl"
    write_predictions(path, WHOLE[:1])

    def broken():
        yield WHOLE[1]
        raise RuntimeError("the model fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        write_predictions(path, broken())
    with pytest.raises(DataError, match="second prediction for id 'a'"):
        write_predictions(path, [WHOLE[1], WHOLE[1]])
    assert read_predictions(path) == WHOLE[:1]
    assert [each.name for each in tmp_path.iterdir()] == ["preds.jsonl"]


def test_the_folder_is_made(tmp_path):
    write_predictions(tmp_path / "new" / "preds.jsonl", [Prediction(id="1", prediction="a")])
    assert [each.id for each in read_predictions(tmp_path / "new" / "preds.jsonl")] == ["1"]


def test_who_has_the_old_file_open_reads_it_to_its_end(tmp_path):
    path = tmp_path / "preds.jsonl"
    write_predictions(path, WHOLE)
    with path.open(encoding="utf-8") as old:
        write_predictions(path, WHOLE[:1])
        assert len(old.read().split("\n")) == 4


def test_confidence_is_the_score_or_the_probability_of_what_was_said():
    assert [each.confidence for each in WHOLE] == [0.75, 0.5, None]
    assert Prediction(id="x", prediction="none of them", probs={"two": 1.0}).confidence is None
    assert Prediction(id="x", prediction="two", probs={"two": 1.0}, score=0.2).confidence == 0.2


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"image_id": 42, "caption": "a dog"}], ("42", "a dog")),
        ([{"image_id": 42, "id": 1, "caption": "a dog"}], ("42", "a dog")),  # as COCO's own tools write results again
        ([{"question_id": 262148000, "answer": "down"}], ("262148000", "down")),
        ([{"question_id": 7, "prompt": "What?", "text": "A dog.", "answer_id": "x", "model_id": "m"}], ("7", "A dog.")),
        ([{"question": "is there a bird in the image?", "answer": "yes"}], ("1", "yes")),
        ([{"id": "é", "prediction": "x", "reference": None, "probs": None, "score": None, "group": None}], ("é", "x")),
    ],
    ids=["coco", "coco with ids", "vqa", "llava", "pope", "ours"],
)
@pytest.mark.parametrize("form", ["lines", "list", "pretty"])
def test_other_peoples_files_are_read(file, rows, expected, form):
    path = file(rows if form == "lines" else json.dumps(rows, indent=2 if form == "pretty" else None))
    (read,) = read_predictions(path)
    assert (read.id, read.prediction) == expected
    assert read.references == ()


def test_popes_answers_are_counted_from_one(file):
    rows = [{"question": f"is there {i}?", "answer": "no"} for i in range(3)]
    read = read_predictions(file(rows))
    assert [each.id for each in read] == ["1", "2", "3"]
    assert read[2].input == {"question": "is there 2?"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1, "prediction": "a"}\n{"id": 2, "prediction"\n', r"preds.jsonl:2: Expecting ':'"),
        ('{"id": 1, "prediction": "a"}\n\n{"id": "1", "prediction": "b"}\n', "preds.jsonl:3: a second prediction for"),
        ('{"id": 1, "prediction": "a"}\n[1]\n', r"preds.jsonl:2: must be an object; got '\[1\]'"),
        ('{"id": 1, "prediction": "a"}\n{"prediction": "b"}\n', "preds.jsonl:2: needs an id .*got None"),
        ('{"id": 1, "prediction": "a"}\n{"id": true, "prediction": "b"}\n', "preds.jsonl:2: needs an id .*got True"),
        ('{"id": 1, "prediction": "a"}\n{"id": 2.5, "prediction": "b"}\n', "preds.jsonl:2: needs an id .*got 2.5"),
        ('{"id": 1, "prediction": "a"}\n{"id": 2, "prediction": 3}\n', "preds.jsonl:2: needs text as prediction or"),
        ('{"id": 1, "prediction": "a"}\n{"id": 2}\n', "preds.jsonl:2: needs text as prediction or answer.*got None"),
        ('{"id": 1, "prediction": "a"}\n{"id": 2, "prediction": "b", "score": NaN}\n', "jsonl:2: NaN is no number"),
        ('{"id": 1, "prediction": "a"}\n{"id": 2, "prediction": "b", "score": 1e999}\n', "2: score must be a finite"),
        ('{"id": 1, "prediction": "a", "score": "high"}\n{"id": 2, "prediction": "b"}', "jsonl:1: score must be a fin"),
        (
            '{"id": 1, "prediction": "a", "probs": {"a": 0.5, "b": 0.4}}\n{}',
            "1: probs must sum to 1; they sum to 0.9000",
        ),
        ('{"id": 1, "prediction": "a", "probs": {"a": 1.5, "b": -0.5}}\n{}', "jsonl:1: probs must give each candidate"),
        ('{"id": 1, "prediction": "a", "probs": [1.0]}\n{}', "jsonl:1: probs must give each candidate"),
        ('{"id": 1, "prediction": "a", "reference": [1]}\n{}', r"jsonl:1: references must be .* got \[1\]"),
        ('{"id": 1, "prediction": "a", "reference": []}\n{}', "jsonl:1: references must be one text or a list"),
        ('{"id": 1, "prediction": "a", "group": 3}\n{}', "jsonl:1: group must be str; got 3"),
        ('{"id": 1, "prediction": "a", "meta": "m"}\n{}', "jsonl:1: meta must be dict; got 'm'"),
        ('[{"id": 1, "prediction": "a"}, 5]', "preds.jsonl: object 2: must be an object; got '5'"),
        ('[{"id": 1, "prediction": "a"}\n{"id": 2}]', "preds.jsonl: Expecting ',' delimiter: line 2"),
        ("7", "preds.jsonl: must hold objects, one a line or in a list; got '7'"),
        ("", "preds.jsonl: has no predictions"),
        ("[]", "preds.jsonl: has no predictions"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(file, text, message):
    with pytest.raises(DataError, match=message):
        read_predictions(file(text))


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "preds.jsonl"
    path.write_bytes(json.dumps({"id": 1, "prediction": "é"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(DataError, match=r"preds\.jsonl: is not UTF-8"):
        read_predictions(path)


def test_references_of_our_own_file(file):
    rows = [{"id": 1, "reference": "two", "group": "count"}, {"id": "b", "prediction": "x", "reference": ["y", "z"]}]
    assert read_references(file(rows)) == {"1": Truth(("two",), "count"), "b": Truth(("y", "z"))}


def test_references_of_coco(file):
    annotations = [{"id": n, "image_id": image, "caption": f"caption {n}"} for n, image in enumerate([5, 9, 5])]
    text = json.dumps({"info": {}, "images": [{"id": 5}, {"id": 9}], "annotations": annotations})
    assert read_references(file(text)) == {"5": Truth(("caption 0", "caption 2")), "9": Truth(("caption 1",))}


def test_references_of_vqa(file):
    answers = [{"answer": "net" if n else "a net", "answer_confidence": "maybe", "answer_id": n + 1} for n in range(10)]
    row = {"question_type": "what", "multiple_choice_answer": "net", "answers": answers, "image_id": 458752}
    text = json.dumps({"annotations": [row | {"answer_type": "other", "question_id": 458752000}]}, indent=1)
    assert read_references(file(text)) == {"458752000": Truth(("a net", *["net"] * 9), "other")}


def test_references_of_pope_and_of_one_answer(file):
    pope = {"question_id": 1, "image": "x.jpg", "text": "Is there a dog in the image?", "label": "yes"}
    assert read_references(file([pope])) == {"1": Truth(("yes",))}
    assert read_references(file(json.dumps([{"question_id": 3, "answer": "dog"}]))) == {"3": Truth(("dog",))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1, "reference": "a"}\n{"id": 1, "reference": "b"}', "jsonl:2: a second reference for id '1'"),
        ('{"id": 1, "reference": "a"}\n{"id": 2, "truth": "b"}', "jsonl:2: has none of reference, answers, label"),
        ('{"annotations": [{"question_id": 1, "answers": [{"a": 2}]}]}', "object 1: references must be one text"),
        ('{"annotations": {"1": "a"}}', "must hold objects, one a line or in a list"),
        ('{"annotations": []}', "has no references"),
    ],
)
def test_bad_references_are_refused_with_their_line(file, text, message):
    with pytest.raises(DataError, match=message):
        read_references(file(text))


def test_references_from_a_file_replace_those_that_predictions_bring():
    predictions = [
        Prediction(id="1", prediction="a", references=("old",), group="g"),
        Prediction(id="2", prediction="b"),
    ]
    got = with_references(predictions, {"2": Truth(("y",), "h"), "1": Truth(("x",))})
    assert [(each.id, each.references, each.group) for each in got] == [("1", ("x",), "g"), ("2", ("y",), "h")]
    assert predictions[0].references == ("old",)


def test_what_lacks_a_prediction_or_a_reference_is_refused_or_left_out():
    predictions = [Prediction(id=str(i), prediction="a", references=("r",) * (i < 2)) for i in range(3)]
    with pytest.raises(DataError, match=r"1 predictions have no reference: '2'; to leave them out: --allow-missing"):
        with_references(predictions)
    assert [each.id for each in with_references(predictions, allow_missing=True)] == ["0", "1"]
    truths = {str(i): Truth(("x",)) for i in range(1, 8)}
    with pytest.raises(DataError, match=r"5 references have no prediction: '3', '4', '5', \.\.\.; to leave"):
        with_references(predictions, truths)
    assert [each.id for each in with_references(predictions, truths, allow_missing=True)] == ["1", "2"]


@pytest.mark.parametrize("allow_missing", [False, True])
def test_nothing_to_score_is_refused(allow_missing):
    with pytest.raises(DataError, match=r"none of 1 predictions has a reference; name a file .*--references"):
        with_references([Prediction(id="1", prediction="a")], allow_missing=allow_missing)
    with pytest.raises(DataError, match="none of 1 predictions has a reference"):
        with_references([Prediction(id="1", prediction="a")], {"2": Truth(("x",))}, allow_missing=allow_missing)


def test_means_of_groups_by_hand():
    means = group_means([1, 1, 1, 0, 0.5], ["b", "b", "b", "a", None])
    assert means.mean == {"": 0.5, "a": 0.0, "b": 1.0}
    assert means.count == {"": 1, "a": 1, "b": 3}
    assert (means.micro, means.macro, means.worst) == (0.7, 0.5, "a")


def test_means_of_groups_need_items():
    for scores, groups in (([], []), ([1.0], [])):
        with pytest.raises(DataError, match="needs the group of each score"):
            group_means(scores, groups)
