"""The benchmark: limits by hand, the plain way gives the same picture, every workload runs, what is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from toy import SETTINGS, open_run, raised

from nmlib import bench, config, plan_stages, runtime, speed_plots, throughput, workloads
from nmlib import records as stored_records
from nmlib.bench_setup import QUICK, Bench, Sizes, tokens_of
from nmlib.prefix_cache import PrefixCache
from nmlib.products import products
from nmlib.runtime import RunError
from nmlib.throughput import compile_layers, noise_batch
from nmlib.timing import Task, exponent, measure, summary
from nmlib.workloads import Recompute, one_by_one

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PARAMS = config.parse(SETTINGS, "toy")


def quick(sizes: Sizes = QUICK) -> Bench:
    return Bench(PARAMS, sizes, repeats=1, warmup=0)


@pytest.fixture(scope="module")
def report() -> bench.Report:
    return bench.run_bench(PARAMS, repeats=2, warmup=0, sizes=QUICK)


# ---------------------------------------------------------------------------------------------------------
# arithmetic


def test_tokens_by_hand() -> None:
    """N = 4. An upload that is history: `<s> [INST] #1 <img>` C4 `</img> here is a picture [/INST]` = 14.

    An edit: `[INST] make the A V [/INST]` 6, reply `V A #k to #k+1 <img>` 6, queries 4, history 4, `</img>` 1.
    """
    maker = quick()
    _, template = maker.model()
    upload, said, asked, drawn, kept = 4 + 4 + 6, 6, 6, 4, 4 + 1
    talk = maker.talk(4)
    packed, prefix = template.packed([talk]), [template.prefix([talk], [index]) for index in (1, 2, 3)]
    assert tokens_of(packed) == upload + 3 * (said + asked + drawn) + 2 * kept
    assert [tokens_of(part) for part in prefix] == [
        upload + before * (said + asked + kept) + said + asked + drawn for before in (0, 1, 2)
    ]
    last = Recompute(maker.system(), talk, 3)
    assert workloads.plain_history(last) == upload + 2 * (said + asked + kept)


def test_limits_in_the_report(report: bench.Report) -> None:
    upload, edit = 14, 17
    for rounds in QUICK.training_rounds:
        prefix = sum(upload + before * edit + 16 for before in range(rounds - 1))
        packed = upload + 16 * (rounds - 1) + 5 * (rounds - 2)
        assert report.result(f"training.ratio{rounds}").limit == pytest.approx(prefix / packed)
    each = [upload + 16 * (rounds - 1) + 5 * (rounds - 2) for rounds in QUICK.mixed_rounds]
    assert report.result("packing.packed").limit == pytest.approx(3 * max(each) / sum(each))
    late = QUICK.late
    assert report.result("recompute.ratio").limit == pytest.approx((upload + edit * (late - 2) + 16) / 16)
    assert report.result("queries.ratio").limit == QUICK.queries
    assert report.result("growth.cached").limit == 0.0
    assert 0.3 < (report.result("growth.plain").limit or 0) < 1.2, "tokens grow linearly, but for the ends"


@pytest.mark.parametrize(("rank", "limit"), [(3, 1.0), (9, (4 * (1152 + 27 * 48) + 3 * (2112 + 27 * 68)) / 16416)])
def test_limit_of_folding_by_hand(rank: int, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers of 24 x 24 and three of 24 x 44: at rank 3 A and B apart are less work, at rank 9 none is."""
    model = PARAMS.model.model_copy(update={"lora_rank": rank})
    assert (model.hidden_size, model.intermediate_size) == (24, 44)
    maker = Bench(PARAMS.model_copy(update={"model": model}), QUICK, repeats=1, warmup=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    products(maker)
    found = {result.id: result.limit for result in maker.results}
    assert found == {"products.attention": None, "products.lora": pytest.approx(limit)}


def test_bytes_are_those_of_the_new_tokens(report: bench.Report) -> None:
    assert report.result("memory.branch").value == 1.0
    assert report.result("growth.forks_bytes").value == pytest.approx(1.0, abs=1e-9)
    tokens = 6 + 6 + 4 + 1
    assert report.result("memory.round").value == (2 * 2 * 24 * tokens * 4 + 4 * 20 * 4 + tokens + 8) / 2**20
    paper = 2 * 40 * 5120 * (tokens - 4 + 64) * 2 / 2**20
    assert report.result("memory.round_paper").value == pytest.approx(paper)


def test_an_exponent_is_found() -> None:
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert exponent([2, 5, 9], [7, 7, 7]) == pytest.approx(0)


def test_median_and_interval() -> None:
    found = summary(np.array([5.0, 1.0, 3.0]))
    assert found == {"value": 3.0, "low": 1.0, "high": 5.0, "repeats": 3}
    one = summary(np.array([2.0]))
    assert one["low"] == one["high"] == 2.0


def test_tasks_take_turns_and_what_prepares_is_not_timed() -> None:
    said: list[str] = []
    tasks = {name: Task(lambda n=name: said.append(n), lambda n=name: said.append(f"({n})")) for name in "ab"}
    found = measure(tasks, repeats=2, warmup=1)
    assert said == ["(a)", "a", "(b)", "b"] * 3
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}


# ---------------------------------------------------------------------------------------------------------
# both ways give the same


def test_the_plain_way_gives_the_same_picture() -> None:
    maker = quick()
    system = maker.system()
    session = maker.session(system, 5)
    assert [node.base for node in session.tokens.nodes] == [None, 0, 1, 2, 3]
    features = torch.stack([session.tokens.tokens(index) for index in range(4)])
    answer = Recompute(system, maker.talk(5), 4).answer(features)[0]
    torch.testing.assert_close(answer.cpu(), session.tokens.tokens(4).cpu(), **CLOSE)


def test_token_by_token_gives_the_same_picture_and_leaves_the_history() -> None:
    model, template = quick().model(9)
    cache = PrefixCache(model, template.image_ids)
    cache.read_images(torch.randn(1, 9, model.feature_dim), 0)
    torch.testing.assert_close(one_by_one(cache), cache.query(), **CLOSE)
    assert cache.length == 9


def test_models_lie_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a card, it is the card that is measured."""
    monkeypatch.setattr(runtime, "device", lambda: torch.device("meta"))
    maker = quick()
    assert maker.model()[0].device.type == "meta"
    system = maker.system()
    for module in (system.encoder, system.detokenizer, system.model):
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


def test_a_model_counts_as_far_as_the_workloads() -> None:
    model, _ = quick(Sizes()).model()
    assert model.settings.max_rounds == 64 == len(model.marker_ids)


# ---------------------------------------------------------------------------------------------------------
# what is written


def test_every_workload_reports_under_its_name(report: bench.Report) -> None:
    assert {result.id.partition(".")[0] for result in report.results} == set(bench.WORKLOADS)
    assert len({result.id for result in report.results}) == len(report.results)
    assert [row["rounds"] for row in report.series["rounds"]] == list(QUICK.growth)
    assert [row["forks"] for row in report.series["forks"]] == list(QUICK.forks)
    assert all(workload.__doc__ for workload in bench.WORKLOADS.values())


def test_saved_and_loaded(report: bench.Report, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    bench.save(report, path)
    assert bench.load(path) == report
    raw = json.loads(path.read_text())
    assert raw["weights"] == "untrained" and raw["machine"] and raw["repeats"] == 2
    assert set(raw["results"][0]) == {"id", "value", "low", "high", "repeats", "unit", "limit", "meaning"}
    path.write_text(json.dumps(raw | {"repeats": 0}))
    assert "bench.json: no report of the benchmark: repeats:" in raised(lambda: bench.load(path), RunError)


def test_records_name_what_measures_them_again(report: bench.Report, tmp_path: Path) -> None:
    run = open_run(tmp_path)
    bench.record(run, report)
    found = stored_records.read_records(run)
    assert len(found) == len(report.results)
    one = found["bench.queries.ratio"]
    assert one.command == "python -m nmlib bench --params toy --only queries --repeats 2" and one.n == 2
    assert one.value == report.result("queries.ratio").value and one.limit == QUICK.queries
    assert found["bench.latency.early"].limit is None, "a time has none"
    lines = bench.table(report).splitlines()
    assert len(lines) == len(found) + 1 and lines[-1].endswith("untrained weights")


def test_figures(report: bench.Report) -> None:
    names = ("training.ratio3", "queries.ratio", "latency.ratio")
    for figure in (
        speed_plots.ratios([report.result(name) for name in names]),
        speed_plots.cost_by_rounds(report.series["rounds"]),
    ):
        assert figure.png().startswith(b"\x89PNG")
    bars = speed_plots.ratios([report.result("queries.ratio")]).axes[0]
    assert [text.get_text().partition(" of ")[2] for text in bars.texts] == ["4"]


def test_unknown_names_are_refused(report: bench.Report) -> None:
    text = raised(lambda: bench.run_bench(PARAMS, ["speed"]), RunError)
    assert text == f"benchmark: no workload 'speed'; there are {', '.join(bench.WORKLOADS)}"
    assert "no result 'x'; there are training." in raised(lambda: report.result("x"), RunError)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from nmlib import __main__ as cli

    for name in ("notebooks", "params"):
        (tmp_path / name).mkdir()
    (tmp_path / "params" / "toy.yaml").write_text(yaml.safe_dump(SETTINGS))
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> int:
        with pytest.raises(SystemExit) as caught:
            cli.main(["bench", "--params", "toy", *words])
        return int(caught.value.code or 0)

    assert call("--quick", "--repeats", "1", "--only", "memory", "--out", "here.json") == 0
    assert "memory.branch" in capsys.readouterr().out
    assert bench.load(tmp_path / "here.json").repeats == 1
    assert not (tmp_path / "runs" / "toy" / "records").exists(), "tiny workloads are not recorded"
    assert call("--only", "speed") == 1
    assert "no workload 'speed'" in capsys.readouterr().err
    assert call("--repeats", "0") == 2


def test_throughput_counts_the_step_that_it_times(report: bench.Report) -> None:
    stage = next(stage for stage in PARAMS.stages if stage.data)
    _, template = plan_stages.build(PARAMS, stage)
    work = plan_stages.step_work(PARAMS, stage, template, own_history=False)
    batch = noise_batch(quick(), stage, template)
    assert batch["layout"].input_ids.shape == (work.rows, work.length)
    assert batch["features"].shape[:2].numel() == work.pictures
    found = {
        name: report.result(f"throughput.{name}").value for name in ("tokens", "pictures", "flops", "product", "mfu")
    }
    spoken = 0 if batch["words"] is None else batch["words"].input_ids.numel()
    assert found["tokens"] / found["pictures"] == pytest.approx((work.tokens + spoken) / work.pictures)
    assert found["flops"] * 1e12 / found["pictures"] == pytest.approx(work.flops / work.pictures)
    assert min(found.values()) > 0


def test_compiled_layers_compute_what_they_did() -> None:
    stage = next(stage for stage in PARAMS.stages if stage.data)
    model, template = plan_stages.build(PARAMS, stage)
    batch, calls = noise_batch(quick(), stage, template), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls.append(len(inputs))
        return graph

    with torch.no_grad():
        before = model(**batch)
        compile_layers(model, backend)
        after = model(**batch)
    assert calls, "no layer went through the compiler"
    torch.testing.assert_close(after, before)


def test_a_card_that_cannot_compile_leaves_its_rows_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 36 GiB")

    monkeypatch.setattr(throughput, "_steps", too_large)
    made = quick()
    throughput._compiled_steps(made, next(stage for stage in PARAMS.stages if stage.data))
    assert capsys.readouterr().err == "throughput.compiled is left out: CUDA out of memory.\n" and not made.results
