"""Cut the emulator of one ratio from the factors."""

from __future__ import annotations

from emloc.devices import pick_dtype
from emloc.emulator import cut, plan_ranks, table
from emloc.factor_files import FactorFiles
from emloc.files import write_json
from emloc.models import open_model
from emloc.targets import ratios_for
from tasks import layout
from tasks.original import find_original
from tasks.params import Params
from tasks.stage import costing, main_with_ratio
from tasks.tables import write_csv


def run(params: Params, ratio: float) -> None:
    """Write the emulator, its sizes, and rank, size and predicted loss of each layer."""
    path, pointer = find_original(params)
    folder = layout.results(ratio)
    with costing(folder / "compress.cost.json", params):
        factors = FactorFiles(layout.FACTORS)
        targets = params.compress.targets
        ratios = ratios_for(factors.modules, targets, ratio, where="compress.targets")
        plan = plan_ranks(factors, ratios)
        sizes = cut(
            path,
            open_model(path, dtype=pick_dtype(params.model.dtype)),
            factors,
            plan,
            out=layout.emulator(ratio),
            base_name=pointer["name"],
            progress=True,
        )
    layers = sizes.pop("layers")
    write_csv(folder / "layers.csv", list(layers[0]), layers)
    write_json(folder / "compress.json", sizes)
    print(table(plan))
    print(
        f"emulator: {sizes['emulator_bytes'] / 2**20:.0f} MiB of the original's "
        f"{sizes['original_bytes'] / 2**20:.0f} MiB in {layout.emulator(ratio)}"
    )


if __name__ == "__main__":
    main_with_ratio(run)
