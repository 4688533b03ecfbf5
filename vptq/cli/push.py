"""`vptq push`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vptq.cli.options import make_parser, normalise_flags
from vptq.cli.show import say
from vptq.errors import RunError, UsageError

EXAMPLES = """\
  vptq push outputs/.../packed_model --repo my-name/my-llama-2bit
  vptq push outputs/my-llama/2bits/2026-01-31-12-00-00 --repo my-name/my-llama-2bit --private"""


def run(argv: Sequence[str]) -> int:
    """Upload a checkpoint; returns the exit code."""
    parser = make_parser("push", "Upload a packed checkpoint and its model card to the Hugging Face hub.", EXAMPLES)
    parser.add_argument("path", nargs="?", metavar="PATH", help="packed checkpoint, or the run folder that it is in")
    parser.add_argument("--repo", default=None, metavar="ORG/NAME", help="where to; made if it is not there")
    parser.add_argument("--private", action="store_true", default=False, help="make it private, where it is made")
    parser.add_argument("--message", default=None, metavar="STR", help="of the commit")
    args = parser.parse_args(normalise_flags(argv))
    if getattr(args, "path", None) is None or args.repo is None:
        hint = "such as vptq push outputs/.../packed_model --repo my-name/my-llama-2bit"
        raise UsageError("PATH and --repo say what goes where", hint=hint)
    folder = _packed(Path(args.path).expanduser())
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repo = api.create_repo(args.repo, private=args.private, exist_ok=True)
        if args.private and not api.repo_info(repo.repo_id).private:
            raise UsageError(f"`{repo.repo_id}` is there and public", hint="give another --repo, or leave out --private")
        say(f"uploading {folder} to {repo.repo_id}")
        commit = api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message=args.message or "Packed checkpoint, written by vptq"
        )
    except UsageError:
        raise
    except Exception as error:  # whatever hub and network make of it
        raise RunError(
            f"`{args.repo}` could not be uploaded to",
            where=[str(error).strip().split("\n")[0]],
            hint="see the network, the name, and `hf auth login`; what was uploaded is kept, so run it again",
        ) from error
    print(getattr(commit, "commit_url", None) or f"https://huggingface.co/{repo.repo_id}")
    return 0


def _packed(path: Path) -> Path:
    from vptq.checkpoint.reader import is_packed

    folder = path / "packed_model" if (path / "packed_model" / "config.json").exists() else path
    if not is_packed(folder):
        raise UsageError(f"`{folder}` is not a packed VPTQ checkpoint", hint="give a packed_model folder")
    return folder
