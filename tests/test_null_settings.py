"""Settings that are null: told where the class that is made of them takes none, and left alone elsewhere."""

from dataclasses import dataclass
from typing import Any

import pytest
from jsonargparse import Namespace

from d2dmoe_pl.cli import main
from d2dmoe_pl.errors import ConfigError
from d2dmoe_pl.null_settings import check_nulls


@dataclass
class Inner:
    width: int = 3
    name: str | None = None


class Base:
    def __init__(self, of_base: float = 1.0, anything: Any = 0, untyped=0, implicit: int = None) -> None: ...  # noqa: RUF013


class Kind(Base):
    def __init__(self, inner: Inner, others: list[Base] | None = None, **kwargs: Any) -> None: ...


def settings(**changes):
    return Namespace(**{"inner": Namespace(width=1, name=None), "others": None, "of_base": 2.0} | changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"anything": None}, {"untyped": None}, {"implicit": None}, {"unknown": None}, {"others": []}],
    ids=str,
)
def test_what_may_be_null(changes):
    check_nulls("data", Kind, settings(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of_base": None}, r"^data.of_base=null: must be float$"),
        ({"inner": None}, r"^data.inner=null: must be .*Inner$"),
        ({"inner": Namespace(width=None, name=None)}, r"^data.inner.width=null: must be int$"),
        (
            {"others": [Namespace(class_path=f"{__name__}.Base", init_args=Namespace(of_base=None))]},
            r"^data.others\[0\].init_args.of_base=null: must be float$",
        ),
    ],
    ids=str,
)
def test_what_may_not(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_nulls("data", Kind, settings(**changes))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.init_args.batch_size", "fine_tuning: data.init_args.batch_size=null: must be int"),
        ("trainer.accumulate_grad_batches", "fine_tuning: trainer.accumulate_grad_batches=null: must be int"),
        (
            "router_regression.model.init_args.decay",
            "router_regression: model.init_args.decay=null: must be none, linear, cosine",
        ),
    ],
)
def test_a_chain_is_refused_before_it_begins(tmp_path, capsys, setting, said):
    with pytest.raises(SystemExit):
        main(["chain", "--set", f"{setting}=null", "--output_dir", str(tmp_path / "run")])
    assert f"error: {said}\n" in capsys.readouterr().err
