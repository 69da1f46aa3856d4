"""The wheel, as a user gets it: built, installed into a fresh environment outside the repo, and trained with."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

SCRIPT = """
import json, sys
import torch
from peft import get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
import smf, smf.recipe_file

torch.manual_seed(0)
config = Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=1)
model = get_peft_model(Qwen2ForCausalLM(config), smf.SparseMemoryConfig(layers=[1], n_keys=8, heads=2, knn=2, k_dim=8))
ids = torch.randint(0, 50, (2, 12))
background = smf.read_background(model, [{"input_ids": ids}])
optimizer = smf.SparseMemoryOptimizer(model, background, lr=1e-2, rows_per_step=4)
model.train()
losses = []
for _ in range(2):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
patch = smf.save_patch(model, sys.argv[1])
print(json.dumps({"file": smf.__file__, "losses": losses, "rows": len(patch.rows[1]),
                  "recipes": sorted(p.name for p in smf.recipe_file.SHIPPED.glob("*.toml"))}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; its dependencies are those of this one, so that no network is needed."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPO)]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True, timeout=100)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    # a plain path: the editable install of the repo, a .pth file in there, is not followed
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [str(folder / "env/bin/python"), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=200)
    return folder / "env"


def test_installed_wheel_trains_two_steps_outside_the_repo(environment: Path, tmp_path: Path):
    import json

    command = [str(environment / "bin/python"), "-c", SCRIPT, str(tmp_path / "patch.smf")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert str(environment) in report["file"]
    assert report["losses"][1] < report["losses"][0]
    assert 0 < report["rows"] <= 8
    assert "local_example.toml" in report["recipes"]


def test_installed_wheel_runs_the_demo_outside_the_repo_and_has_its_types(environment: Path, tmp_path: Path):
    options = ["--max-steps", "1", "--limit", "5", "--methods", "smf-kl"]
    command = [str(environment / "bin/smf"), "demo", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "smf-kl" in done.stdout and (tmp_path / "runs/demo-trial/report.html").is_file()
    assert list(environment.glob("lib/python*/site-packages/smf/py.typed"))
