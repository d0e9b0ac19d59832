"""The subcommands of ``dvla-fast``: what each does, its settings and its examples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One subcommand: its line in the overview, its settings' class, and its examples."""

    summary: str
    config: str
    examples: str


# Commands of two words, with what their overview adds.
GROUPS = ("data", "semantics")

COMMANDS = {
    "demo": Command(
        "learn to read digits never seen in training, in minutes on a CPU",
        "DemoRun",
        """  dvla-fast demo
  dvla-fast demo --quick
  dvla-fast demo --seed 1 --output runs/my-demo
  dvla-fast demo --resume --output runs/my-demo""",
    ),
    "data check": Command(
        "check a data set: layout, splits, counts, unreadable and duplicate images",
        "DataCheck",
        """  dvla-fast data check photos/
  dvla-fast data check CUB_200_2011/ --splits cub_100_50_50
  dvla-fast data check photos/ --splits my-split.json --shot 1 --counts_only
  dvla-fast data check caches/cub-224""",
    ),
    "data prepare": Command(
        "decode a data set once into a cache that training maps into memory",
        "DataPrepare",
        """  dvla-fast data prepare photos/ --output caches/photos-84 --image_size 84
  dvla-fast data prepare CUB_200_2011/ --splits cub_100_50_50 --output caches/cub-224
  dvla-fast data prepare photos/ --output caches/photos-224 --skip_unreadable

the same command continues a build that was stopped""",
    ),
    "semantics build": Command(
        "write a bank with a language model, from class names and support images",
        "SemanticsBuild",
        """  dvla-fast semantics build --data.dataset photos/ --output bank.json
  dvla-fast semantics build --data.dataset photos/ --output bank.json \\
      --language_model.base_url http://localhost:8000/v1 --construct.images 3
  dvla-fast semantics build --data.dataset CUB_200_2011/ --data.splits cub_100_50_50 \\
      --construct.split [test] --construct.images 1 --output cub-novel.json \\
      --language_model.backend transformers --construct.encoder open_clip:ViT-B-16/openai
  dvla-fast semantics build --construct.classes names.txt --output bank.json \\
      --language_model.backend files --language_model.answers answers.json

the same command continues a build that was stopped: no answer is asked for twice""",
    ),
    "semantics show": Command(
        "show a bank of class texts: candidates with scores, what was chosen, where it is from",
        "SemanticsShow",
        """  dvla-fast semantics show digits
  dvla-fast semantics show digits eight
  dvla-fast semantics show shapes rokobu --top_k 6
  dvla-fast semantics show banks/birds.json 'Sooty Albatross'""",
    ),
    "semantics diff": Command(
        "show what differs between two banks, class by class",
        "SemanticsDiff",
        """  dvla-fast semantics diff shapes shapes-true
  dvla-fast semantics diff birds.json birds-corrected.json""",
    ),
    "semantics edit": Command(
        "edit one class of a bank in $EDITOR; only a valid class gets into the bank",
        "SemanticsEdit",
        """  dvla-fast semantics edit birds.json 'Sooty Albatross'
  EDITOR=nano dvla-fast semantics edit birds.json jay""",
    ),
    "semantics encode": Command(
        "encode a bank's texts into a file beside it, which training and evaluation then read",
        "SemanticsEncode",
        """  dvla-fast semantics encode birds.json --encoder open_clip:ViT-B-16/openai
  dvla-fast semantics encode birds.json --encoder transformers:models/siglip --top_k 8
  dvla-fast semantics encode digits""",
    ),
    "semantics check": Command(
        "check a bank: format, texts, classes of a data set, images that it has seen",
        "SemanticsCheck",
        """  dvla-fast semantics check digits --data.dataset digits
  dvla-fast semantics check birds.json --encoder open_clip:ViT-B-16/openai
  dvla-fast semantics check birds.json --data.dataset CUB_200_2011/""",
    ),
    "semantics import": Command(
        "make a bank of vectors that others published (VT-FSL, DVLA-RL, SemFew, DVLA-RL++)",
        "SemanticsImport",
        """  dvla-fast semantics import cifar_semantic_clip_cot.pth --output banks/cifar-fs.json
  dvla-fast semantics import semantic.pth --attributes attributes.pth --output banks/cub.json""",
    ),
    "pretrain": Command(
        "pre-train a backbone on base classes",
        "PretrainRun",
        """  dvla-fast pretrain --output runs/backbone
  dvla-fast pretrain --data.dataset photos/ --data.image_size 84 --pretrain.augment.flip true
  dvla-fast pretrain --model.backbone resnet12 --data.dataset photos/ --data.image_size 84
  dvla-fast pretrain --config runs/backbone/config.yaml --seed 1
  dvla-fast pretrain --resume --output runs/backbone""",
    ),
    "metatune": Command(
        "meta-tune gates and backbone on episodes, with policy gradients",
        "MetatuneRun",
        """  dvla-fast metatune --checkpoint runs/backbone/checkpoints/pretrain-best.safetensors
  dvla-fast metatune --checkpoint PRE.safetensors --metatune.shots [5] --metatune.epochs 40
  dvla-fast metatune --checkpoint PRE.safetensors --metatune.objective ppo --metatune.baseline value
  dvla-fast metatune --config runs/backbone/config.yaml --checkpoint PRE.safetensors \\
      --semantics.bank bank.json
  dvla-fast metatune --checkpoint visformer-CUB.pth --model.backbone visformer_tiny
  dvla-fast metatune --model.backbone clip --model.pretrained laion2b_s34b_b88k
  dvla-fast metatune --resume --output runs/tuned""",
    ),
    "evaluate": Command(
        "evaluate a checkpoint on episodes of novel classes",
        "EvaluateRun",
        """  dvla-fast evaluate --checkpoint runs/tuned/checkpoints/metatune-best.safetensors
  dvla-fast evaluate --checkpoint TUNED.safetensors --evaluate.shots [5] --evaluate.episodes 600
  dvla-fast evaluate --config runs/tuned/config.yaml --checkpoint TUNED.safetensors
  dvla-fast evaluate --checkpoint TUNED.safetensors --evaluate.split val
  dvla-fast evaluate --checkpoint TUNED.safetensors --evaluate.episode_list authors
  dvla-fast evaluate --checkpoint visformer-CUB.pth --data.dataset caches/cub-224
  dvla-fast evaluate --checkpoint SEED0.safetensors --checkpoints [SEED1.safetensors]
  dvla-fast evaluate --checkpoint TUNED.safetensors --compare runs/other-evaluation""",
    ),
    "predict": Command(
        "classify image files into classes learned from a few images each",
        "PredictImages",
        """  dvla-fast predict photos/ --checkpoint TUNED.safetensors --supports birds/
  dvla-fast predict photos/ --checkpoint TUNED.safetensors --supports birds/ \\
      --bank birds.json --output photos.json
  dvla-fast predict a.jpg b.jpg --checkpoint TUNED.safetensors --supports birds/ --rows 2

birds/ holds a folder for each class, with a few images of it""",
    ),
    "report": Command(
        "write one self-contained HTML page about runs",
        "ReportRun",
        """  dvla-fast report runs/result
  dvla-fast report runs/backbone runs/tuned runs/result --output report.html
  dvla-fast report runs/seed-0 runs/seed-1 --title "Two seeds" --text_only
  dvla-fast report runs/result --shot 5 --episodes [0,17] --output episodes.html""",
    ),
    "compare": Command(
        "say whether one evaluation is better than another, on the same episodes",
        "CompareRun",
        """  dvla-fast compare runs/result runs/other
  dvla-fast compare runs/result runs/result --method_b "fixed gate"
  dvla-fast compare a/seed-0,a/seed-1,a/seed-2 b/seed-0,b/seed-1,b/seed-2
  dvla-fast compare runs/result runs/other --output comparison.json""",
    ),
    "ablate": Command(
        "train and compare variants over seeds on the same episodes: table, plot, intervals",
        "AblateRun",
        """  dvla-fast ablate configs/ablation_digits.yaml --output runs/ablation
  dvla-fast ablate configs/ablation_shapes.yaml --ablate.groups [semantics,alpha]
  dvla-fast ablate configs/ablation_shapes.yaml --ablate.variants [visual,alpha=0.5]
  dvla-fast ablate my.yaml --ablate.seeds 10 --ablate.processes 8 --output runs/ablation
  accelerate launch --num_processes 4 -m dvla_fast ablate my.yaml --output runs/ablation

the same command continues what was stopped, on any number of machines that share the folder""",
    ),
    "doctor": Command("say what is installed, what runs here, and how to fix it", "", ""),
}
