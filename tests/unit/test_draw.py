"""Reports as people read them: terminal tables, pages and the model card, from small reports made here."""

import base64
import hashlib
import math
import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import yaml

from deltaguard.reports.card import model_card
from deltaguard.reports.charts import layers_chart
from deltaguard.reports.demo import demo_page, demo_table
from deltaguard.reports.layers import block_and_kind, kinds
from deltaguard.reports.page import page as page_of
from deltaguard.reports.records.base import ModelReference
from deltaguard.reports.records.dial import Dial
from deltaguard.reports.records.restore import RareExpert, Refinement, RestoreReport
from deltaguard.reports.restore import others_table, restore_page, restore_table
from deltaguard.reports.table import Cell, Column, Table
from deltaguard.reports.text import duration, hub_id, percent, short_reference
from drawing import at_80_columns
from restores import ATTACK, GPT2, LLAMA, NEOX, demo_report, layer, restore_report

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects them with the tags around each text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append((data, tuple(self.open)))

    def around(self, text):
        return next(tags for data, tags in self.texts if text in data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


PAGES = {
    "demo": lambda: demo_page(demo_report()),
    "restore": lambda: restore_page(restore_report()),
}


@pytest.fixture(scope="module", params=PAGES)
def page(request):
    return PAGES[request.param]()


def test_pages_reference_nothing_outside_themselves(page):
    parsed = Page(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"img", "iframe", "object", "embed", "base", "image", "use"}
    links = [
        v for _, attributes in parsed.tags for k, v in attributes.items() if k in {"src", "href", "srcset"}
    ]
    assert links == ["data:,"]
    assert "@import" not in page
    assert "url(" not in page
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= namespaces
    policy = next(a["content"] for a in parsed.named("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]


def test_the_policy_allows_the_one_script_of_a_page(page):
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in Page(page).named("meta") if "http-equiv" in a)
    assert f"script-src 'sha256-{digest}';" in policy
    assert "http" not in script


def test_pages_are_accessible(page):
    parsed = Page(page)
    assert parsed.named("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(parsed.named("caption")) == len(parsed.named("table")) > 0
    assert len(parsed.named("svg")) == len([a for a in parsed.named("div") if a.get("role") == "img"]) > 0
    assert all(a["aria-label"] for a in parsed.named("div") if a.get("role") == "img")
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in page


def test_answers_are_escaped_and_harmful_ones_folded():
    text = demo_page(demo_report())
    assert ATTACK not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
    parsed = Page(text)
    assert "details" in parsed.around("harmful answer")
    assert "details" in parsed.around("refused again")
    assert "details" not in parsed.around("a harmful prompt")
    assert "details" not in parsed.around("harmless answer")
    assert "(an empty answer)" in text
    assert all("open" not in attributes for attributes in parsed.named("details"))


def test_names_of_tensors_and_models_are_escaped_in_pages_and_charts():
    report = restore_report(
        names=(f"model.layers.{{}}.{ATTACK}.weight",),
        finetuned=ModelReference(reference=f"/runs/{ATTACK.replace('/', '')}", fingerprint="f"),
    )
    text = restore_page(report)
    assert len(Page(text).named("script")) == 1


def test_demo_page_tells_every_rate_and_fact():
    text = demo_page(demo_report())
    for number in ("16.7 %", "100.0 %", "20.3 %", "3.4 %", "91.2 %", "89.3–92.8 %", "n = 1000", "92.4 %"):
        assert number in text
    for fact in ("1 June 2025, 12:05 UTC", "torch 2.9.0", "Linux x86_64", "<dd>7</dd>", "8 min 20 s"):
        assert fact in text
    assert "fine-tuned 3," in text


def test_pages_show_folders_by_their_last_name():
    assert "/home/someone" not in demo_page(demo_report())
    assert "/home/someone" not in restore_page(restore_report())
    assert "my-finetune" in restore_page(restore_report())


def test_folders_among_the_options_are_shown_by_their_last_name():
    options = {"method": "safe-lora", "pretrained": "/home/someone/models/base", "strength": 0.5}
    report = restore_report(options=options)
    page = restore_page(report)
    assert "/home/someone" not in page
    assert "<dd>base</dd>" in page


def test_what_must_be_known_of_a_restore_is_on_its_page_and_in_its_card():
    told = "Of the 64 responses in /home/someone/store 0% refuse: <b>nothing was learned."
    for drawn in (restore_page, lambda report: model_card(report, front_matter=None)):
        text = unescape(drawn(restore_report(warnings=(told,))))
        assert "Of the 64 responses in store 0% refuse" in text
        assert "/home/someone" not in text
        assert "What a reader must know" in text
        assert "What a reader must know" not in drawn(restore_report())
        assert "<b>" not in drawn(restore_report(warnings=(told,)))


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (1, "Of one expert less is known"),
        (20, "Of 20 experts less"),
        (21, "These are the 20 of which least is known."),
    ],
)
def test_a_card_says_how_many_experts_are_rare(count, told):
    experts = [RareExpert(name=f"experts.{i}", tokens=i, pooled=0.9) for i in range(count)]
    card = model_card(restore_report(rare_experts=experts), front_matter=None)
    assert told in " ".join(card.split())
    assert ("These are the" in card) is (count > 20)
    assert card.count("`experts.") == min(count, 20)


def test_without_curvature_there_is_no_safety_chart_but_a_dash():
    layers = tuple(layer(LLAMA[0].format(block), cost=None) for block in range(2))
    assert layers_chart(layers, "safety_cost") is None
    report = restore_report(layers=layers, safety_cost=None)
    text = restore_page(report)
    assert len(Page(text).named("svg")) == 2
    assert "<dd>–</dd>" in text
    table = at_80_columns(restore_table(report))
    assert re.search(r"safety cost +– *\n", table)
    assert re.search(r"q_proj +2 +43.8 % +43.8 % +43.8 % +31.2 % +– +25.0 %", table)
    assert "| safety cost | – |" in model_card(report, front_matter=None)


def test_every_output_says_of_what_the_kept_share_is():
    """A closed form shrinks the whole delta: what is left of it is no share of its entries."""
    layers = tuple(layer(LLAMA[0].format(block), entries=None) for block in range(2))
    priced = restore_report(
        layers=layers, kept_energy=0.576, kept_entries=None, mu=2e6, options={"method": "kfac"}
    )
    shown = (
        restore_page(priced),
        at_80_columns(restore_table(priced)),
        model_card(priced, front_matter=None),
    )
    for text in map(" ".join, map(str.split, shown)):
        assert re.search("57.6 %(</strong>)? of the delta(&#39;|')s energy", text)
        assert "entries" not in text
    selected = restore_report()
    shown = (restore_page(selected), at_80_columns(restore_table(selected)))
    for text in (*map(" ".join, map(str.split, shown)), model_card(selected, front_matter=None)):
        assert re.search("43.8 %(</strong>)? of the delta(&#39;|')s energy", text)
        assert re.search("31.2 % of the delta(&#39;|')s entries", text)


def test_numbers_that_were_measured_are_not_said_to_come_from_the_weights():
    dial = Dial(
        limit=6e-4,
        device="cpu",
        conversations=64,
        tokens=965,
        finetuned_kl=0.44,
        restored_kl=6e-4,
        whole=False,
        probes=(),
    )
    given = {"options": {"method": "kfac", "max_safety_kl": 6e-4}, "mu": 2e6}
    measured, computed = restore_report(dial=dial, **given), restore_report(**given)
    by_running = "Safety KL was measured by running the model on 64 safety conversations"
    for report, expected in ((measured, True), (computed, False)):
        card = " ".join(model_card(report, front_matter=None).split())
        page = " ".join(unescape(restore_page(report)).split())
        assert (by_running in card) == (by_running in page) == expected
        assert ("These numbers are computed from the weights" in page) != expected
    steps = Refinement(
        steps=4,
        taken=3,
        kept=False,
        reason="no gain",
        seed=0,
        conversations=16,
        safety_before=0.1,
        safety_after=0.05,
        task_before=0.1,
        task_after=0.1,
        safety_kl_before=0.1,
        safety_kl_after=None,
        weights_sha256=None,
        seconds=1.0,
    )
    page = " ".join(unescape(restore_page(restore_report(refinement=steps))).split())
    assert "the steps' own prompts were measured by running the model. The other numbers are" in page


def test_a_table_is_one_thing_in_three_forms():
    rows = [
        ("`x|<b>", Cell("12.0 %", 0.12, "6.0–18.0 %", 150), "so <i>", "3 s"),
        ("y", Cell("none", math.nan), "", "–"),
    ]
    table = Table.of(
        "Odd | names",
        rows,
        (
            (Column("name", "name", code=True), lambda row: row[0]),
            ("a\nshare", lambda row: row[1]),
            (Column("why", "words"), lambda row: row[2]),
            (Column("time", under="name"), lambda row: row[3]),
        ),
        note="a note",
        strong=lambda row: row[0] == "y",
    )
    assert table.markdown().splitlines() == [
        "| name | a share | why | time |",
        "| --- | ---: | --- | ---: |",
        "| `` `x¦<b> `` | 12.0 % (6.0–18.0 %) | so ‹i> | 3 s |",
        "| `y` | none |  | – |",
    ]
    shown = at_80_columns(table.terminal())
    assert re.search(r"^ Odd \| names \(a note\)", shown, re.MULTILINE)
    assert re.search(r"`x\|<b> +12\.0 % +so <i> *\n 3 s +6\.0–18\.0 %", shown)
    page = page_of("test", "t", [table], created="2025-06-01T14:05:00+02:00")
    assert Page(page).around("x|<b>")[-2:] == ("th", "code")
    cell = '<td data-value="0.12">12.0 %<small>6.0–18.0 % <span>(n = 150)</span></small></td>'
    assert cell in page
    assert '<td data-value="">none</td>' in page
    assert page.count('<tr class="strong">') == 1


def test_a_chart_draws_one_bar_for_each_matrix_in_a_block():
    report = restore_report(names=GPT2, blocks=5)
    layers = (*report.layers, layer("score.weight"))
    svg = layers_chart(layers, "kept_energy")
    assert svg.count("var(--c2") == 15
    assert all(f">{label}<" in svg for label in ("c_attn", "attn.c_proj", "mlp.c_proj"))
    assert layers_chart(layers[-1:], "kept_energy") is None


def test_tables_fit_80_columns_with_whole_numbers():
    demo = at_80_columns(demo_table(demo_report()))
    rows = {line.split()[0]: line for line in demo.splitlines() if line.count(" %") == 3 and "–" not in line}
    assert list(rows) == ["aligned", "fine-tuned", "restored"]
    assert re.findall(r"\S+ %", rows["fine-tuned"]) == ["100.0 %", "1.2 %", "98.7 %"]
    assert "1000 harmful, 1000 harmless, 1000 task messages" in " ".join(demo.split())
    assert re.search(r"17\.9–22\.9 % +2\.4–4\.7 % +89\.3–92\.8 %", demo)
    assert re.search(r"share of the task gain kept +92\.4 %", demo)
    assert re.search(r"incoherent answers .* fine-tuned 3", demo)
    restored = at_80_columns(
        restore_table(restore_report(names=(*NEOX, "h.{}." + "long_" * 12 + "name.weight")))
    )
    numbers = ["43.8 %"] * 3 + ["31.2 %", "6.2 %", "25.0 %"]
    assert len(re.findall(" +".join(numbers), restored)) == 3
    assert "1 min 15 s (read 2.0 s, solve 1 min 10 s)" in restored
    assert re.search(r"aligned +2 +1 +--other-params aligned", restored)
    assert "greedy (strength 0.125, compensation joint, other params aligned)" in " ".join(restored.split())
    assert all(len(line) <= 80 and "…" not in line for line in (demo + restored).splitlines())


def test_tables_print_foreign_names_as_they_are():
    report = restore_report(finetuned=ModelReference(reference="/runs/[red]tuned", fingerprint="f"))
    assert "[red]tuned" in at_80_columns(restore_table(report))
    report = restore_report(names=("h.{}.[bold]odd.weight",))
    assert "[bold]odd" in at_80_columns(restore_table(report))


def test_a_demo_without_gain_shows_a_dash():
    report = demo_report(kept_gain=None)
    assert re.search(r"share of the task gain kept +–", at_80_columns(demo_table(report)))
    assert "restored model keeps" not in demo_page(report)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.self_attn.q_proj.weight", (12, "self_attn.q_proj")),
        ("h.0.attn.c_attn.weight", (0, "attn.c_attn")),
        ("transformer.h.3.mlp.c_proj.weight", (3, "mlp.c_proj")),
        ("gpt_neox.layers.5.attention.query_key_value.weight", (5, "attention.query_key_value")),
        ("model.decoder.layers.1.fc1.weight", (1, "fc1")),
        ("model.layers.0.mlp.experts.7.up_proj.weight", (0, "mlp.experts.up_proj")),
        ("lm_head.weight", (-1, "lm_head")),
    ],
)
def test_block_and_kind_come_from_the_name(name, expected):
    assert block_and_kind(name) == expected


def test_kinds_have_the_shortest_label_that_tells_them_apart():
    groups = kinds(restore_report(names=GPT2).layers)
    assert [kind.label for kind in groups] == ["c_attn", "attn.c_proj", "mlp.c_proj"]
    assert [block for block, _ in groups[0].layers] == [0, 1, 2]
    rows = [layer(LLAMA[0].format(i), kept=kept) for i, kept in enumerate((0.1, 0.9, 0.2))]
    kept = kinds(rows)[0].spread("kept_energy")
    assert (kept.low, kept.median, kept.high) == (0.1, 0.2, 0.9)


def test_other_tensors_are_counted_by_source_and_reason():
    rows = others_table(restore_report().others).rows
    assert [[cell.text for cell in row.cells[:3]] for row in rows] == [
        ["aligned", "2", "1"],
        ["both", "1", "1"],
    ]


def metadata(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_card_keeps_the_metadata_of_the_finetuned_model():
    report = restore_report(finetuned=ModelReference(reference="someone/tuned@v1", fingerprint="f"))
    given = {
        "license": "mit",
        "language": ["en", "de"],
        "library_name": "peft",
        "base_model": "someone/aligned-model",
        "tags": ["trl", "base_model:adapter:someone/aligned-model"],
        "model-index": [{"name": "tuned"}],
    }
    assert metadata(model_card(report, front_matter=given)) == {
        "license": "mit",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "base_model": "someone/tuned",
        "base_model_relation": "finetune",
        "tags": ["trl", "deltaguard", "safe-delta"],
    }


@pytest.mark.parametrize(
    ("given", "aligned", "expected"),
    [
        ({"base_model": ["/data/llama", "org/parent"]}, "someone/aligned-model", "org/parent"),
        ({"base_model": "/data/llama"}, "someone/aligned-model@main", "someone/aligned-model"),
        (None, "./aligned", None),
    ],
)
def test_card_names_no_folder_as_base_model(given, aligned, expected):
    report = restore_report(aligned=ModelReference(reference=aligned, fingerprint="a"))
    card = model_card(report, front_matter=given)
    assert metadata(card).get("base_model") == expected
    assert ("base_model_relation" in metadata(card)) == (expected is not None)
    assert "/home/someone" not in card
    assert "`my-finetune`" in card


def test_a_folder_that_exists_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("out/tuned") == "out/tuned"
    (tmp_path / "out" / "tuned").mkdir(parents=True)
    assert hub_id("out/tuned") is None
    assert short_reference("out/tuned") == "tuned"


def test_a_rank_is_shown_as_the_number_that_it_is():
    given = {"method": "kfac", "strength": 1.0, "output_format": "adapter", "adapter_rank": 16}
    report = RestoreReport.model_validate_json(restore_report(options=given).model_dump_json())
    assert "adapter rank 16)" in " ".join(at_80_columns(restore_table(report)).split())
    assert "| `adapter_rank` | `16` |" in model_card(report, front_matter=None)
    assert "| `strength` | `1.0` |" in model_card(report, front_matter=None)


def test_card_says_what_was_done_and_how_to_verify():
    card = model_card(restore_report(), front_matter=None)
    assert "| `strength` | `0.125` |" in card
    assert "| `other_params` | `aligned` |" in card
    assert "| `q_proj` | 3 | 43.8 % | 43.8 % | 43.8 % | 31.2 % | 6.2 % | 25.0 % |" in card
    assert "| aligned | 2 | 1 | --other-params aligned |" in card
    for words in (
        "deltaguard verify .",
        "arXiv:2505.12038",
        "What this does not promise",
        "a" * 64,
        "f" * 64,
    ):
        assert words in card
    assert not re.search(r"[ \t]+$", card, re.MULTILINE)
    assert "\n\n\n" not in card


def test_card_without_curvature_claims_no_safe_delta():
    report = restore_report(store_conversations=None, options={"method": "interpolate", "strength": 0.5})
    assert metadata(model_card(report, front_matter=None))["tags"] == ["deltaguard"]


def test_card_reads_no_name_as_markup():
    report = restore_report(names=(f"layers.{{}}.a`b|{ATTACK}.weight",))
    row = next(line for line in model_card(report, front_matter=None).splitlines() if "a`b" in line)
    assert row.startswith(f"| `` a`b¦{ATTACK} `` | 3 |")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0.0 %"),
        (0.12345, "12.3 %"),
        (1.0, "100.0 %"),
        (-0.05, "-5.0 %"),
        (0.0004, "0.040 %"),
        (1e-9, "< 0.001 %"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_percent(value, expected):
    assert percent(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.97, "1 min 0 s"), (3599.7, "1 h 0 min"), (7260, "2 h 1 min")],
)
def test_duration(seconds, expected):
    assert duration(seconds) == expected
