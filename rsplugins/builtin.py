"""The built-in plugin. It comes in through the entry point ``rsplugins``, by the same hooks as anybody's."""

from __future__ import annotations

from rsplugins.certificate import Guarantee, Norm, Threat
from rsplugins.host import (
    BoundOperatorDescriptor,
    CertifierDescriptor,
    DatasetDescriptor,
    DenoiserDescriptor,
    ModelSourceDescriptor,
    TrainingHookDescriptor,
    hookimpl,
)

RSPLUGINS_API = 1


@hookimpl
def rsplugins_certifiers() -> list[CertifierDescriptor]:
    """Randomised smoothing in its variants, and bounds of the network's margins."""
    return [
        CertifierDescriptor(
            name="gaussian",
            summary="Gaussian randomised smoothing: Clopper-Pearson on votes (Cohen et al. 2019)",
            factory="rsplugins.certifiers.gaussian:Gaussian",
            claim="rsplugins.statistics.claims:gaussian",
            guarantee=Guarantee.PROBABILISTIC,
            norms=(Norm.L2,),
        ),
        CertifierDescriptor(
            name="gaussian-soft",
            summary="Gaussian smoothing of class probabilities, with a valid bound on their mean",
            factory="rsplugins.certifiers.gaussian:GaussianSoft",
            claim="rsplugins.statistics.claims:gaussian_soft",
            guarantee=Guarantee.PROBABILISTIC,
            norms=(Norm.L2,),
        ),
        CertifierDescriptor(
            name="latent",
            summary="smoothing in the latent, divided by a Lipschitz bound of the encoder (Zeng et al. 2021); needs split=LAYER",
            factory="rsplugins.certifiers.latent:Latent",
            claim="rsplugins.lipschitz.claims:latent",
            guarantee=Guarantee.PROBABILISTIC,
            norms=(Norm.L2,),
            default=False,
        ),
        CertifierDescriptor(
            name="lipschitz-margin",
            summary="margin over a Lipschitz bound of the network (Tsuzuku et al. 2018)",
            factory="rsplugins.certifiers.lipschitz_margin:LipschitzMargin",
            claim="rsplugins.lipschitz.claims:lipschitz_margin",
            guarantee=Guarantee.DETERMINISTIC,
            norms=(Norm.L2,),
        ),
        CertifierDescriptor(
            name="smooth-reduce",
            summary="smoothing of patches or sub-videos whose scores are reduced (Joshi et al. 2022), with valid radii",
            factory="rsplugins.certifiers.smooth_reduce:SmoothReduce",
            claim="rsplugins.reduction.claims:smooth_reduce",
            guarantee=Guarantee.PROBABILISTIC,
            norms=(Norm.L2,),
        ),
        *_bound_certifiers(),
        CertifierDescriptor(
            name="patch-cleanser",
            summary="double masking: no square patch changes the defended model's class (Xiang et al. 2022)",
            factory="rsplugins.certifiers.patch_cleanser:PatchCleanser",
            claim="rsplugins.patches.claims:patch_cleanser",
            guarantee=Guarantee.DETERMINISTIC,
            norms=(Threat.PATCH,),
        ),
        CertifierDescriptor(
            name="attack",
            summary="PGD in three forms and AutoAttack, side by side; survival proves nothing",
            factory="rsplugins.certifiers.attack:Attack",
            claim="rsplugins.attacks.claims:attack",
            guarantee=Guarantee.EMPIRICAL,
            norms=(Norm.LINF,),
            default=False,
            labelled=True,
        ),
        CertifierDescriptor(
            name="predict",
            summary="the model's own predictions, without a guarantee",
            factory="rsplugins.certifiers.predict:Predict",
            claim="rsplugins.attacks.claims:predict",
            guarantee=Guarantee.NONE,
            default=False,
        ),
        CertifierDescriptor(
            name="covariance",
            summary="radius estimated by propagating a Gaussian (Zhen et al. 2021); an estimate, never a certificate",
            factory="rsplugins.certifiers.covariance:Covariance",
            claim="rsplugins.moments.claims:covariance",
            guarantee=Guarantee.ESTIMATE,
            norms=(Norm.L2,),
            requires=("auto-LiRPA>=0.3",),
        ),
        CertifierDescriptor(
            name="covariance-guided",
            summary="votes whose class and number a propagated Gaussian fixes beforehand: fewer samples, the same guarantee",
            factory="rsplugins.certifiers.covariance_guided:CovarianceGuided",
            claim="rsplugins.moments.claims:covariance_guided",
            guarantee=Guarantee.PROBABILISTIC,
            norms=(Norm.L2,),
            requires=("auto-LiRPA>=0.3",),
        ),
    ]


def _bound_certifiers() -> list[CertifierDescriptor]:
    methods = {
        "ibp": ("Ibp", "interval bounds of the margins (Gowal et al. 2019)"),
        "crown-ibp": ("CrownIbp", "CROWN margins over interval bounds (Zhang et al. 2020)"),
        "crown": ("Crown", "linear relaxation backwards through the network (Zhang et al. 2018)"),
        "alpha-crown": ("AlphaCrown", "CROWN with slopes optimised for each input (Xu et al. 2021); slow"),
        "etb": ("Etb", "expected tight bounds (Alsubaihi et al. 2021): an estimate, never a certificate"),
        "sound-etb": ("SoundEtb", "expected tight bounds made sound, never wider than interval bounds"),
    }
    return [
        CertifierDescriptor(
            name=name,
            summary=summary,
            factory=f"rsplugins.certifiers.bounds:{factory}",
            claim=f"rsplugins.lirpa.claims:{name.replace('-', '_')}",
            guarantee=Guarantee.ESTIMATE if name == "etb" else Guarantee.DETERMINISTIC,
            norms=(Norm.LINF, Norm.L2, Norm.L1),
            requires=("auto-LiRPA>=0.3",),
            default=name != "alpha-crown",
        )
        for name, (factory, summary) in methods.items()
    ]


@hookimpl
def rsplugins_bound_operators() -> list[BoundOperatorDescriptor]:
    """Expected tight bounds of linear layers (``MatMul`` is one without bias) and convolutions; functions that 0.3 lacks."""
    lacking = [
        BoundOperatorDescriptor(
            name=name,
            summary=f"{summary}, onnx::{operator}; where auto-LiRPA has no bounds of its own",
            factory=f"rsplugins.lirpa.elementwise:Bound{operator}",
            requires=("auto-LiRPA>=0.3",),
            operator=f"onnx::{operator}",
            guarantee=Guarantee.DETERMINISTIC,
        )
        for name, operator, summary in (
            ("clip", "Clip", "ReLU6, Hardtanh, clamp to constants"),
            ("erf", "Erf", "the error function, of which GELU is made"),
            ("hard-sigmoid", "HardSigmoid", "hard sigmoid and hard swish"),
        )
    ]
    return lacking + [
        BoundOperatorDescriptor(
            name=f"{family}-{operator.lower()}",
            summary=f"{summary}, onnx::{operator}",
            factory=f"rsplugins.lirpa.etb:{prefix}{layer}",
            requires=("auto-LiRPA>=0.3",),
            operator=f"onnx::{operator}",
            guarantee=guarantee,
            default=False,  # the certifiers etb and sound-etb ask for them by name
        )
        for family, prefix, summary, guarantee in (
            ("etb", "Etb", "expected tight bounds, block by block", Guarantee.ESTIMATE),
            ("sound-etb", "SoundEtb", "sound expected tight bounds", Guarantee.DETERMINISTIC),
            ("sound-etb-pass", "PassThrough", "sound expected tight bounds, passed through", Guarantee.DETERMINISTIC),
        )
        for operator, layer in (("Gemm", "Linear"), ("MatMul", "MatMul"), ("Conv", "Conv"))
    ]


@hookimpl
def rsplugins_models() -> list[ModelSourceDescriptor]:
    """Sources of pretrained classifiers, by scheme."""
    return [
        ModelSourceDescriptor(
            name="timm", summary="timm models, from the hub or a local file", factory="rsplugins.models.timm:load"
        ),
        ModelSourceDescriptor(
            name="torchvision",
            summary="torchvision models with the transforms of their weights",
            factory="rsplugins.models.torchvision:load",
        ),
        ModelSourceDescriptor(
            name="robustbench",
            summary="RobustBench models, by name, data set and threat model",
            factory="rsplugins.models.robustbench:load",
            # robustbench imports `autoattack`, which pyautoattack carries, and `pkg_resources`, which setuptools 81 removed
            requires=("robustbench>=1.1", "pyautoattack>=0.2", "setuptools<81"),
        ),
        ModelSourceDescriptor(name="zoo", summary="models of this project's zoo", factory="rsplugins.models.zoo:load"),
        ModelSourceDescriptor(name="file", summary="a checkpoint file on this machine", factory="rsplugins.models.file:load"),
    ]


@hookimpl
def rsplugins_datasets() -> list[DatasetDescriptor]:
    """The embedded digits, the usual torchvision data sets, and any folder of images."""
    digits = DatasetDescriptor(
        name="digits", summary="8x8 handwritten digits, embedded (scikit-learn)", factory="rsplugins.data.digits:load"
    )
    folder = DatasetDescriptor(
        name="folder", summary="a folder of images, one sub-folder a class", factory="rsplugins.data.folder:load", argument="PATH"
    )
    through_torchvision = {
        "mnist": "28x28 handwritten digits",
        "fashion-mnist": "28x28 pictures of clothes",
        "svhn": "32x32 house numbers",
        "cifar10": "32x32 photographs, 10 classes",
        "cifar100": "32x32 photographs, 100 classes",
        "imagenet": "ILSVRC 2012 photographs, 1000 classes",
        "places365": "photographs of places, 365 classes",
    }
    rest = [
        DatasetDescriptor(name=name, summary=summary, factory="rsplugins.data.torchvision:load")
        for name, summary in through_torchvision.items()
    ]
    moving = DatasetDescriptor(
        name="moving-digits",
        summary="16x16 videos of digits that move, rotate or grow, generated",
        factory="rsplugins.data.moving_digits:load",
        argument="FRAMES",
    )
    ucf101 = DatasetDescriptor(
        name="ucf101",
        summary="videos of actions, 101 classes",
        factory="rsplugins.data.ucf101:load",
        requires=("av>=12",),
        argument="FRAMES",
    )
    return [digits, *rest, folder, moving, ucf101]


@hookimpl
def rsplugins_training_hooks() -> list[TrainingHookDescriptor]:
    """What a recipe may name under ``[[hooks]]``."""
    hooks = {
        "gaussian": ("smoothing:GaussianAugmentation", "Gaussian augmentation (Cohen et al. 2019)"),
        "consistency": ("smoothing:Consistency", "consistency of noisy predictions (Jeong and Shin 2020)"),
        "macer": ("smoothing:Macer", "maximise the soft smoothed radius (Zhai et al. 2020)"),
        "covariance": ("covariance:CovarianceTraining", "maximise the radius by propagated covariances (Zhen et al. 2021)"),
        "latent-noise": ("smoothing:LatentNoise", "noise between encoder and head, for latent smoothing"),
        "at": ("adversarial:AdversarialTraining", "adversarial training on PGD images (Madry et al. 2018)"),
        "fat": ("adversarial:FriendlyAdversarialTraining", "early-stopped PGD (Zhang et al. 2020)"),
        "trades": ("adversarial:Trades", "clean cross-entropy plus KL (Zhang et al. 2019)"),
        "mart": ("adversarial:Mart", "misclassification-aware adversarial training (Wang et al. 2020)"),
        "geometry-weights": ("gairat:GeometryWeights", "GAIRAT's weights, on top of another attack's hook"),
        "gairat": ("gairat:Gairat", "geometry-aware reweighted AT (Zhang et al. 2021)"),
        "gair-fat": ("gairat:GairFat", "geometry-aware reweighted FAT"),
        "gair-trades": ("gairat:GairTrades", "geometry-aware reweighted TRADES, two attacks"),
        "gair-mart": ("gairat:GairMart", "geometry-aware reweighted MART, our definition"),
        "mail-at": ("gairat:MailAt", "AT weighted by the probability margin (Wang et al. 2021)"),
        "ibp": ("bounding:IbpTraining", "interval bound propagation (Gowal et al. 2019)"),
        "etb": ("bounding:EtbTraining", "expected tight bounds, block by block; a surrogate, not sound"),
        "sound-etb": ("bounding:SoundEtbTraining", "sound expected tight bounds, never wider than interval bounds"),
        "etb-released": ("bounding:EtbReleasedTraining", "ETB as in the released code: one masked Jacobian"),
        "denoise": ("denoising:Denoising", "train a denoiser in front of a classifier by squared error"),
        "denoise-stability": ("denoising:DenoisingStability", "train a denoiser to keep the class (Salman et al. 2020)"),
        "mail-trades": ("gairat:MailTrades", "TRADES weighted by the probability margin"),
    }
    return [
        TrainingHookDescriptor(name=name, summary=summary, factory=f"rsplugins.training.{home}")
        for name, (home, summary) in hooks.items()
    ]


@hookimpl
def rsplugins_denoisers() -> list[DenoiserDescriptor]:
    """Denoisers of the zoo, of the diffusers library, and in files."""
    return [
        DenoiserDescriptor(name="zoo", summary="denoisers of this project's zoo", factory="rsplugins.models.zoo:load_denoiser"),
        DenoiserDescriptor(
            name="diffusers",
            summary="one step of an unconditional diffusion model (Carlini et al. 2023), from a folder or the hub",
            factory="rsplugins.denoising.diffusion:load",
            requires=("diffusers>=0.30",),
        ),
        DenoiserDescriptor(
            name="file",
            summary="a U-Net in a safetensors file, as rsplugins.denoising.network.save writes it",
            factory="rsplugins.denoising.network:load",
        ),
    ]
