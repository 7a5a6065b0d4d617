from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bellbox.errors import BellboxError
from bellbox.report import (
    LayerValues,
    ReportInput,
    RunRecord,
    Sample,
    SizeRow,
    Verification,
    binarized_page,
    html,
    read_record,
    render,
)
from bellbox.report.bell_box import entropy, normal_cdf
from bellbox.report.spectrum import effective_dimension

LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps what could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "xlink:href", "action") and not (value or "").startswith(
                "#"
            ):
                self.loads.append(f"{tag} {name}={value}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag


def evaluation(step: int, low_bit: bool = True) -> dict:
    layers = dict.fromkeys(LAYERS, 1.99 - 0.001 * step / 10)
    measures = {
        "weight_entropy": {"mean": 1.99, "layers": layers},
        "activation_entropy": {"mean": 1.97, "layers": dict.fromkeys(LAYERS[:2], 1.97)},
        "gamma": {"weight": {}, "activation": {}},
        "saturated": {
            "weight": {"mean": 0.5, "layers": dict.fromkeys(LAYERS, 0.5)},
            "activation": {"mean": 0.48, "layers": dict.fromkeys(LAYERS[:2], 0.48)},
        },
    }
    loss = 5 - step / 20
    return {
        "kind": "eval", "step": step, "tokens": 100 * step, "loss": loss, "perplexity": math.exp(loss),
        "bits_per_byte": loss / 2, **(measures if low_bit else {}), "feature_spectrum": [0.5, 0.25, 0.125, 0.125],
        "seconds": 1.0 * step,
    }  # fmt: skip


def training(step: int) -> dict:
    return {
        "kind": "train", "step": step, "tokens": 100 * step, "loss": 5 - step / 18, "perplexity": 100.0, "lr": 1e-3,
        "grad_norm": 1.0, "tokens_per_s": 5.0, "seconds": 1.0 * step,
    }  # fmt: skip


def record(low_bit: bool = True) -> RunRecord:
    return RunRecord(
        name="run <1> & co",
        train=[training(step) for step in range(2, 31, 2)],
        evals=[evaluation(step, low_bit) for step in (10, 20, 30)],
        config='folder: "<script>alert(1)</script>"\n',
        environment={"torch": "2.13", "git": {"revision": "abc", "dirty": False}},
    )


def everything() -> ReportInput:
    draw = np.random.default_rng(0)
    thresholds = (-0.6744898, 0.0, 0.6744898)
    values = draw.standard_normal((40, 64)).astype(np.float32)
    return ReportInput(
        record=record(),
        step=30,
        model="Llama <b>",
        unigram_bits_per_byte=2.9,
        unigram_loss=6.4,
        levels=4,
        layer=LayerValues(LAYERS[1], values, np.digitize(values, thresholds), thresholds, (-3, -1, 1, 3)),
        weight_gamma={name: draw.normal(0.1, 0.01, 64) for name in LAYERS},
        activation_gamma=dict.fromkeys(LAYERS[:2], 1.5),
        sizes=[SizeRow("low-bit layers", 800, 3200, 1600, 200), SizeRow("whole model", 900, 3600, 1800, 600)],
        verification=Verification(1234567, 0, 4096, 0.0),
        sample=Sample("Once <upon>", " a time\nthere & then", "seed 1"),
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render(everything())


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert parsed.loads == []
    assert "http" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)


def test_every_picture_is_svg_that_can_be_read_with_its_own_ids(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == page.count("<figcaption>") == 8
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("role") == "img"
        assert len(root.get("aria-label") or "") > 10
        assert len(list(root.iter("path"))) >= 10
        ids = {element.get("id") for element in root.iter()}
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', picture)) <= ids
    ids = Page(page).ids
    assert len(ids) == len(set(ids))


def test_pictures_take_their_colours_from_the_page(page: str) -> None:
    used = set(re.findall(r"var\(--(\w+)\)", page))
    defined = set(re.findall(r"--(\w+):", page))
    assert used <= defined
    assert {"ink", "blue", "orange", "green", "red"} <= used
    inside = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.findall(r"#0[0-9a-f]{5}\b|#1[0-9a-f]{5}\b", inside)  # no marker colour is left
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_numbers_of_the_run_are_on_the_page(page: str) -> None:
    for text in (
        "33.12",
        "1.750",
        "1.987",
        "1/8.00",
        "1,234,567 codes compared, 0 differ",
        "unigram model: 2.900",
    ):
        assert text in page


def test_text_from_files_is_escaped(page: str) -> None:
    for text in (
        "run &lt;1&gt; &amp; co",
        "Once &lt;upon&gt;",
        "there &amp; then",
        "&lt;script&gt;",
        "Llama &lt;b&gt;",
    ):
        assert text in page
    assert "<script" not in page


def test_every_part_of_a_page_escapes_what_it_is_given() -> None:
    evil = '<i onclick="x()">&\''
    parts = (
        html.header(evil, evil, [evil, evil]),
        html.cards([(evil, evil, evil)]),
        html.section(evil, evil),
        html.figure_with_caption("<svg/>", evil),
        html.caption(evil),
        html.table([evil], [[evil, evil]]),
        html.sizes([(evil, [evil], evil, evil)]),
        html.agreement(evil, evil, evil, evil, evil, evil),
        html.sample(evil, f"{evil}\n{evil}"),
        html.facts([(evil, evil)]),
        html.details(evil, html.preformatted(evil)),
        html.document(evil, evil),
    )
    for part in parts:
        assert "<i" not in part
        assert 'onclick="' not in part
        assert "&lt;i onclick=&#34;x()&#34;&gt;&amp;&#39;" in part
    assert html.joined([evil, html.caption("a")]).startswith("&lt;i")


def test_the_thresholds_and_code_shares_are_drawn(page: str) -> None:
    assert "N(0, 1)" in page
    shares = [float(one) for one in re.findall(r">(\d+\.\d)%<", page)]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_the_spectrum_of_the_features_is_drawn_with_its_effective_dimension(page: str) -> None:
    entropy_bits = 0.5 * 1 + 0.25 * 2 + 0.25 * 3
    assert effective_dimension([0.5, 0.25, 0.125, 0.125]) == pytest.approx(2**entropy_bits)
    assert effective_dimension([2, 2, 0]) == pytest.approx(2)
    section = page.split("<h2>Features</h2>")[1].split("</section>")[0]
    assert f">{2**entropy_bits:.1f}<" in section
    assert "Effective dimension, of 4" in section
    for step in (10, 20, 30):
        assert f"step {step}" in section
    older = record()
    for one in older.evals:
        del one["feature_spectrum"]
    assert "<h2>Features</h2>" not in render(ReportInput(record=older))


def test_a_full_precision_run_has_a_shorter_page() -> None:
    short = render(ReportInput(record=record(low_bit=False)))
    Page(short)
    assert "<h2>Training</h2>" in short
    for heading in ("Bell, box", "How well", "Learned scales", "Size", "What it writes"):
        assert heading not in short


def test_numbers_that_were_not_finite_leave_gaps() -> None:
    broken = record()
    broken.evals[1].update(loss=None, perplexity=None, bits_per_byte=None)
    broken.evals[2].update(perplexity=None)
    broken.train[3].update(loss=None, grad_norm=None)
    assert "not finite" in render(ReportInput(record=broken, levels=4))


def test_a_run_that_was_not_validated_yet_has_a_page() -> None:
    young = RunRecord("young", [training(1)], [], "folder: x\n", {})
    Page(render(ReportInput(record=young, levels=4)))


@pytest.mark.parametrize("n", [2, 3, 16])
def test_other_numbers_of_levels_are_drawn(n: int) -> None:
    codes = np.arange(n).repeat(10)
    layer = LayerValues(
        "a", np.linspace(-2, 2, n * 10), codes, tuple(np.linspace(-1, 1, n - 1)), tuple(range(n))
    )
    text = render(ReportInput(record=record(), levels=n, layer=layer))
    assert f"{math.log2(n):.3f} of {math.log2(n):.4g} bits" in text


def test_a_nested_run_shows_each_of_its_widths(page: str) -> None:
    nested = record()
    for each in nested.evals:
        widths = {str(bits): {**each, "loss": each["loss"] + (4 - bits) / 4} for bits in (4, 3, 1)}
        each["widths"] = {bits: {**one, "perplexity": math.exp(one["loss"])} for bits, one in widths.items()}
    text = render(ReportInput(record=nested, levels=16))
    Page(text)
    assert "Its widths" not in page
    assert "Its widths" in text
    for bits in (4, 3, 1):
        assert f"{bits} bits" in text
        assert f"{nested.evals[-1]['widths'][str(bits)]['perplexity']:,.2f}" in text
    assert ">2 bits<" not in text


def test_a_record_is_read_from_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(BellboxError, match=r"there is no config\.yaml"):
        read_record(tmp_path)
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    with pytest.raises(BellboxError, match=r"metrics\.jsonl: cannot be read"):
        read_record(tmp_path)
    lines = [training(1), evaluation(1), training(2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    (tmp_path / "environment.json").write_text('{"torch": "2.13"}')
    found = read_record(tmp_path)
    assert [line["step"] for line in found.train] == [1, 2]
    assert found.at(None) == found.at(1) == found.evals[0]
    assert found.environment == {"torch": "2.13"}
    assert found.name == tmp_path.name


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"kind": "eval", "step": 20, "tokens": 5}, "eval record of step 20: field 'loss'"),
        ({**evaluation(20), "perplexity": "low"}, "field 'perplexity'"),
        ({key: value for key, value in evaluation(20).items() if key != "perplexity"}, "field 'perplexity'"),
        ({**evaluation(20), "weight_entropy": {"mean": 1.0}}, "field 'weight_entropy.layers'"),
        ({**evaluation(20), "saturated": None}, "field 'saturated'"),
        ({**evaluation(20), "widths": {"9": {"loss": 1.0, "perplexity": 2.0}}}, "field 'widths.9"),
        ({**evaluation(20), "widths": {"4": {"loss": 1.0}}}, "field 'widths.4.perplexity'"),
        ({**evaluation(20), "accuracy": 0.5}, "eval record of step 1: field 'accuracy'"),
        ({"kind": "train", "step": 20, "tokens": 5, "loss": 1.0}, "train record of step 20: field 'seconds'"),
    ],
)
def test_a_record_without_what_a_page_shows_is_refused_by_step(tmp_path: Path, line: dict, says: str) -> None:
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in (training(1), evaluation(1), line))
    )
    with pytest.raises(BellboxError, match=re.escape(says)) as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_entropy_and_normal_distribution_function() -> None:
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(2)
    assert entropy(np.array([8, 0])) == 0
    expected = [0.5 * math.erfc(-x / math.sqrt(2)) for x in (-3.0, -0.6745, 0.1, 2.0)]
    assert normal_cdf(np.array([-3.0, -0.6745, 0.1, 2.0])) == pytest.approx(expected, abs=1e-6)


def test_the_page_of_a_binarized_model_names_its_own_block() -> None:
    bell = [0, 1, 2, 1]
    group = {
        "norm": "n",
        "loss_untransformed": 3.0,
        "loss": [2.0, 1.0],
        "bells_before": bell,
        "bells_after": bell,
    }
    block = {"layers": {"q": {"error": 0.25}}, "groups": [group], "seconds": 1.0}
    settings = {
        "method": "dbellquant",
        "variant": "clean",
        "samples": 4,
        "context": 24,
        "activation_bits": 16,
    }
    record = {"settings": {**settings, "block": 64}, "blocks": [block]}
    page = binarized_page("two", record, 1.5, 100)
    assert "in its block of 64 columns" in page
    assert "128" not in page.split("<figcaption")[1].split("</figcaption")[0]
