"""The engine settings of a benchmark as flags, from the fields of Settings as in `tpllm` itself."""

from argparse import ArgumentParser, Namespace

from tpllm.cli.options import add_flags, given_flags
from tpllm.config.settings import Settings


def parse_with_engine_flags(parser: ArgumentParser, *chosen: str) -> Namespace:
    """Return the arguments of a script, with the given engine settings as the dict `settings`.

    Args:
        parser: it has the script's own flags
        chosen: settings without a flag, which the script chooses itself
    """
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor_parallel_size")
    add_flags(parser, Settings, "engine", ["tensor_parallel_size", "skip_tokenizer_init", *chosen])
    args = parser.parse_args()
    own = {name: value for name, value in vars(args).items() if "." not in name}
    settings = {"tensor_parallel_size": args.tp, **given_flags(args, Settings)}
    return Namespace(**own, settings=settings)
