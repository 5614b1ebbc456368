"""Stream training rows through the original and keep what it says, to heal emulators with."""

from __future__ import annotations

from emloc.devices import pick_dtype
from emloc.files import writing
from emloc.models import open_model
from emloc.teach import teach
from tasks import layout
from tasks.encoding import codec_of, encode
from tasks.original import find_original
from tasks.params import Params
from tasks.stage import costing, main


def run(params: Params) -> None:
    """One pass over the original for each wave of rows, whatever the ratios are."""
    settings, file = params.teach, layout.RESULTS / "teach.cost.json"
    if not settings.rows:
        with costing(file, params), writing(layout.TEACHER) as folder:
            folder.mkdir()
        return
    path, _ = find_original(params)
    codec = codec_of(path, params)
    rows = encode("train", codec, params)[: settings.rows]
    with costing(file, params, "teach") as device:
        teach(
            open_model(path, dtype=pick_dtype(params.model.dtype)),
            rows,
            codec=codec,
            top_k=settings.top_k,
            batch_size=settings.batch_size,
            wave=settings.wave,
            out=layout.TEACHER,
            device=device,
            progress=True,
        )


if __name__ == "__main__":
    main(run)
