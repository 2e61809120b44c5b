"""`vlmfast search`: the nearest rows of an index, exactly, and a page to look at them."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_run import SIDE, encoded, picture, write_run

from vlmfast import cli
from vlmfast.data.images import load_image
from vlmfast.data.tokenize import load_tokenizer
from vlmfast.eval.gallery import SIDE as THUMBNAIL
from vlmfast.eval.gallery import Found, Hit, contact_sheet, thumbnail
from vlmfast.eval.index import read_index
from vlmfast.models import load_clip


@pytest.fixture
def index(vlmfast, run_folder, pictures, captions, tmp_path):
    path = tmp_path / "index.safetensors"
    vlmfast("embed", "--pretrained", run_folder, "--images", pictures, "--texts", captions, "--out", path)
    return path


@pytest.fixture
def search(vlmfast, run_folder, index):
    def run(*words):
        return json.loads(vlmfast("search", "--pretrained", run_folder, "--index", index, "--json", *words).out)[
            "queries"
        ]

    return run


def nearest(query, items, names):
    """[(name, cosine)], best first."""
    scores = F.normalize(query, dim=1)[0] @ items.T
    return [(names[row], scores[row].item()) for row in scores.argsort(descending=True)]


def test_a_caption_finds_images(search, run_folder, index):
    [query] = search("--text", "a green thing", "--k", "3")
    model, tokenizer, whole = load_clip(run_folder), load_tokenizer(run_folder), read_index(index)
    with torch.no_grad():
        expected = nearest(model.encode_text(tokenizer(["a green thing"])), whole.images, whole.names)[:3]
    assert query["text"] == "a green thing"
    assert [hit["name"] for hit in query["found"]] == [name for name, _ in expected]
    assert [hit["score"] for hit in query["found"]] == pytest.approx([score for _, score in expected], abs=1e-6)


def test_an_image_finds_itself_and_captions(search, run_folder, index, pictures):
    [query] = search("--image", pictures / "red.png", "--k", "99")
    assert query["image"] == str(pictures / "red.png")
    assert len(query["found"]) == 5  # there are no more
    assert query["found"][0] == {"name": "red.png", "score": pytest.approx(1, abs=1e-6)}
    [query] = search("--image", pictures / "red.png", "--find", "captions", "--k", "2")
    pixels = load_image((pictures / "red.png").read_bytes(), SIDE)[None]
    whole = read_index(index)
    with torch.no_grad():
        expected = nearest(load_clip(run_folder).encode_image(pixels), whole.texts, whole.captions)[:2]
    assert [hit["caption"] for hit in query["found"]] == [caption for caption, _ in expected]


def test_many_queries_at_once(search, pictures, captions):
    queries = search(
        "--text", "one", "two", "--texts", captions, "--image", pictures / "red.png", pictures / "blue.png"
    )
    said = [query.get("text") or query["image"].rpartition("/")[2] for query in queries]
    assert said == ["one", "two", "a red thing", "a green thing", "a blue thing", "red.png", "blue.png"]
    assert [query["found"][0]["name"] for query in queries[-2:]] == ["red.png", "blue.png"]
    alone = search("--text", "a red thing")[0]["found"]
    assert [hit["name"] for hit in queries[2]["found"]] == [hit["name"] for hit in alone]


def test_people_get_lines(vlmfast, run_folder, index):
    out = vlmfast("search", "--pretrained", run_folder, "--index", index, "--text", "a red thing", "--k", "2").out
    assert re.fullmatch(r"a red thing\n(  [ -][01]\.\d{4}  \S+\.(png|jpg)\n){2}", out)


class Page(HTMLParser):
    """The images, links, scripts and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.images, self.tags, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.images += [value for name, value in attributes if tag == "img" and name == "src"]

    def handle_data(self, data):
        self.words.append(data)


def test_the_sheet_shows_what_was_found(vlmfast, run_folder, index, pictures, tmp_path):
    sheet = tmp_path / "made" / "sheet.html"
    flags = ["--index", index, "--text", "a <b>red</b> & thing", "--image", pictures / "red.png", "--html", sheet]
    printed = vlmfast("search", "--pretrained", run_folder, *flags).out
    assert str(sheet) in printed
    text = sheet.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.images) == 5 + 1 + 5  # of each query, and the second query itself
    assert all(source.startswith("data:image/") for source in page.images)
    assert not re.search(r"https?://|url\(|<script|<link|@import", text)  # nothing outside is asked for
    assert {"a <b>red</b> & thing", "more/yellow.jpg"} <= {word.strip() for word in page.words}
    scores = [float(word) for word in page.words if re.fullmatch(r"-?\d\.\d{3}", word)]
    assert len(scores) == 10
    assert scores[:5] == sorted(scores[:5], reverse=True)
    assert len(text) < 60_000


def test_the_sheet_survives_lost_files_and_odd_names(tmp_path):
    odd = '"><script>alert(1)</script>&.png'
    (tmp_path / "bad.png").write_bytes(b"bad")
    hits = [Hit(odd, 0.5, tmp_path / "absent.png"), Hit("\udcff.png", 0.25, tmp_path / "bad.png"), Hit(odd, 0.1)]
    page = contact_sheet([Found(odd, hits), Found(odd, hits, tmp_path / "absent.png")], [odd])
    page.encode("utf-8")
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert not parsed.images
    assert sum(odd in word for word in parsed.words) == 7
    assert [word for word in parsed.words if "file" in word] == ["file not readable"] * 3
    assert [word for word in parsed.words if "not an image" in word] == ["not an image"] * 2


def test_thumbnails_are_small_and_small_images_keep_their_pixels(tmp_path):
    import base64
    import io

    import PIL.Image

    sizes = {}
    for name, size in (("large.png", (1200, 300)), ("small.png", (THUMBNAIL, 20))):
        (tmp_path / name).write_bytes(encoded(picture((9, 200, 90), size)))
        uri = thumbnail(tmp_path / name)
        image = PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert uri.startswith(f"data:image/{image.format.lower()};base64,")
        sizes[name] = (image.format, image.size)
    assert sizes == {"large.png": ("JPEG", (THUMBNAIL, 48)), "small.png": ("PNG", (THUMBNAIL, 20))}


def test_images_that_have_moved(vlmfast, run_folder, index, pictures, tmp_path):
    pictures.rename(tmp_path / "moved")
    flags = ["search", "--pretrained", run_folder, "--index", index, "--text", "red", "--html", tmp_path / "sheet.html"]
    vlmfast(*flags)
    assert (tmp_path / "sheet.html").read_text().count("file not readable") == 5
    vlmfast(*flags, "--images", tmp_path / "moved")
    assert (tmp_path / "sheet.html").read_text().count("file not readable") == 0


def test_only_the_model_that_made_an_index_searches_it(vlmfast, refused, run_folder, index, tmp_path):
    other = write_run(tmp_path / "other", seed=4)
    said = refused("search", "--pretrained", other, "--index", index, "--text", "red")
    assert "was made by another model" in said
    assert "step_000002" in said
    before = vlmfast("search", "--pretrained", run_folder, "--index", index, "--text", "red").out
    for form in ("hf", "open_clip"):  # the same weights in another form are the same model
        vlmfast("convert", "--pretrained", run_folder, "--to", form, "--out", tmp_path / form)
        assert vlmfast("search", "--pretrained", tmp_path / form, "--index", index, "--text", "red").out == before


def test_the_activation_is_part_of_the_model(vlmfast, refused, run_folder, index, tmp_path):
    vlmfast("convert", "--pretrained", run_folder, "--to", "hf", "--out", tmp_path / "hf", "--activation", "gelu_tanh")
    said = refused("search", "--pretrained", tmp_path / "hf", "--index", index, "--text", "red")
    assert "was made by another model" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --text, --texts or --image"),
        (["--text", "red", "--k", "0"], "--k must be at least 1; got 0"),
        (["--text", "red", "--index", "absent.safetensors"], "absent.safetensors: there is no such file"),
        (["--text", "red", "--index", "cut.safetensors"], "is not a whole safetensors file"),
        (["--text", "red", "--index", "other.safetensors"], "is no index of vlmfast embed"),
        (["--text", "red", "--find", "captions", "--index", "images.safetensors"], "holds no captions; make it with"),
        (["--image", "bad.png"], "bad.png: not an image"),
        (["--image", "absent.png"], "absent.png"),
        (["--text", "red " * 30, "--long-captions", "refuse"], "context_length is 12"),
    ],
)
def test_bad_input_is_said(flags, message, vlmfast, refused, run_folder, index, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(index.read_bytes()[:-9])
    (tmp_path / "bad.png").write_bytes(b"bad")
    save_file({"images": torch.zeros(2, 16)}, tmp_path / "other.safetensors")
    vlmfast("embed", "--pretrained", run_folder, "--images", pictures, "--out", "images.safetensors")
    given = flags if "--index" in flags else [*flags, "--index", index]
    assert message in refused("search", "--pretrained", run_folder, *given, "--html", "sheet.html")
    assert not (tmp_path / "sheet.html").exists()


def test_an_unknown_flag_names_the_nearest(capsys):
    assert cli.main(["search", "--pretrained", "x", "--index", "y", "--query", "z"]) == 2
    assert "--query" in "".join(capsys.readouterr())
