"""The hooks that a plugin may implement.

A plugin is a module (or object) named by an entry point in the group ``rsplugins``. Every hook takes no argument and returns a
list of descriptors. Implementations must be cheap: no torch, no heavy module; the descriptor's ``factory`` names it instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from rsplugins.host.descriptors import (
    BoundOperatorDescriptor,
    CertifierDescriptor,
    DatasetDescriptor,
    DenoiserDescriptor,
    Descriptor,
    ModelSourceDescriptor,
    MomentRuleDescriptor,
    TrainingHookDescriptor,
)

PROJECT = "rsplugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

RETURNS: dict[str, type[Descriptor]] = {
    "rsplugins_certifiers": CertifierDescriptor,
    "rsplugins_models": ModelSourceDescriptor,
    "rsplugins_datasets": DatasetDescriptor,
    "rsplugins_bound_operators": BoundOperatorDescriptor,
    "rsplugins_moment_rules": MomentRuleDescriptor,
    "rsplugins_denoisers": DenoiserDescriptor,
    "rsplugins_training_hooks": TrainingHookDescriptor,
}
"""Every hook and what its list must hold, in the order of listings."""


class HookSpecs:
    """The specifications, each with an example."""

    @hookspec
    def rsplugins_certifiers(self) -> Sequence[CertifierDescriptor]:  # type: ignore[empty-body]
        """Return certifier descriptors.

        Example::

            @rsplugins.hookimpl
            def rsplugins_certifiers():
                return [
                    rsplugins.CertifierDescriptor(
                        name="uniform-l1",
                        summary="l1 radii from uniform noise",
                        factory="my_package.certifier:UniformL1",
                        claim="my_package.claim:claim",
                        guarantee=rsplugins.Guarantee.PROBABILISTIC,
                        norms=(rsplugins.Norm.L1,),
                    )
                ]
        """

    @hookspec
    def rsplugins_models(self) -> Sequence[ModelSourceDescriptor]:  # type: ignore[empty-body]
        """Return model sources, by scheme.

        Example::

            @rsplugins.hookimpl
            def rsplugins_models():
                return [rsplugins.ModelSourceDescriptor(name="lab", summary="our lab's models", factory="my_package.lab:load")]
        """

    @hookspec
    def rsplugins_datasets(self) -> Sequence[DatasetDescriptor]:  # type: ignore[empty-body]
        """Return data set descriptors.

        Example::

            @rsplugins.hookimpl
            def rsplugins_datasets():
                return [rsplugins.DatasetDescriptor(name="xrays", summary="chest X-rays", factory="my_package.data:xrays")]
        """

    @hookspec
    def rsplugins_bound_operators(self) -> Sequence[BoundOperatorDescriptor]:  # type: ignore[empty-body]
        """Return auto-LiRPA operators.

        Example::

            @rsplugins.hookimpl
            def rsplugins_bound_operators():
                return [
                    rsplugins.BoundOperatorDescriptor(
                        name="elu",
                        summary="bounds of ELU",
                        operator="onnx::Elu",
                        factory="my_package.operators:BoundElu",
                        guarantee=rsplugins.Guarantee.DETERMINISTIC,
                        requires=("auto-LiRPA>=0.3",),
                    )
                ]
        """

    @hookspec
    def rsplugins_moment_rules(self) -> Sequence[MomentRuleDescriptor]:  # type: ignore[empty-body]
        """Return moment rules: what an auto-LiRPA operator does to a Gaussian, for the certifiers ``covariance...``.

        Example::

            @rsplugins.hookimpl
            def rsplugins_moment_rules():
                return [
                    rsplugins.MomentRuleDescriptor(
                        name="softplus",
                        summary="softplus by quadrature",
                        operator="BoundSoftplus",
                        factory="my_package.moments:softplus",
                    )
                ]
        """

    @hookspec
    def rsplugins_denoisers(self) -> Sequence[DenoiserDescriptor]:  # type: ignore[empty-body]
        """Return sources of denoisers, by scheme, for ``rsplugins.denoise`` and ``--denoiser``.

        Example::

            @rsplugins.hookimpl
            def rsplugins_denoisers():
                return [rsplugins.DenoiserDescriptor(name="lab", summary="our denoisers", factory="my_package.denoise:load")]
        """

    @hookspec
    def rsplugins_training_hooks(self) -> Sequence[TrainingHookDescriptor]:  # type: ignore[empty-body]
        """Return training hooks.

        Example::

            @rsplugins.hookimpl
            def rsplugins_training_hooks():
                return [
                    rsplugins.TrainingHookDescriptor(
                        name="gairat",
                        summary="reweighted adversarial training",
                        factory="my_package.gairat:Gairat",
                    )
                ]
        """
