"""The table of traps found in other libraries, and the page it makes.

``python tests/peer_traps.py`` writes ``docs/traps.md``.
"""

from pathlib import Path
from typing import NamedTuple

__all__ = ["PAGE", "PLUMBING", "READS", "STEPS", "TRAPS", "page"]

PAGE = Path(__file__).parent.parent / "docs/traps.md"


class Trap(NamedTuple):
    """One line on what a peer does, one on what we do, and the tests that hold us to it."""

    peer: str
    here: str
    tests: tuple[str, ...]


def trap(peer: str, here: str, *tests: str) -> Trap:
    """Return the row with tests given one by one."""
    return Trap(peer, here, tests)


STEPS, PLUMBING = "test_peer_traps_steps.py::", "test_peer_traps_plumbing.py::"
READS = "test_peer_traps_reads.py::"
CONTRACT, REFERENCE = "test_optim_contract.py::", "test_optim_reference.py::"
PUBLISHED, PAPERS = "test_literature_contract.py::", "test_literature_papers.py::"
ADAMP, PRECISION = "test_literature_adamp.py::", "test_optim_precision.py::"

TRAPS = {
    1: trap(
        "geoopt 0.5.1 RiemannianSGD seeds its momentum with the raw gradient and adds the "
        "projected one: a first step 1 + momentum too long, and not tangent",
        "the buffer starts at zero, as in torch; with a transport, no radial part of a gradient "
        "ever enters it",
        STEPS + "test_geoopt_seeds_its_momentum_with_the_raw_gradient_and_we_do_not",
        STEPS + "test_a_radial_part_of_the_gradient_never_enters_a_buffer",
        REFERENCE + "test_geoopt_sgd_gives_the_same_rows",
    ),
    2: trap(
        "geoopt 0.5.1, adamsrt f159b06, pytorch_optimizer 4.1.0 write into `p.grad`: L2 (on a "
        "sphere without any effect) or Nesterov's average",
        "gradients are bitwise what they were after every step; decay on a fixed sphere is an "
        "error that says what to do",
        STEPS + "test_geoopt_writes_a_decay_that_does_nothing_into_the_gradient_and_we_refuse_it",
        CONTRACT + "test_gradients_and_storage_stay_what_they_are",
        PUBLISHED + "test_gradients_and_storage_stay_what_they_are",
        "test_constrain.py::test_every_layout_is_held_in_place_and_gradients_come_back",
    ),
    3: trap(
        "geoopt 0.5.1 RiemannianAdam(maximize=True) minimizes; foreach and capturable are taken "
        "and ignored",
        "maximizing is minimizing the negative, bit for bit; capturable is refused; "
        "every other option changes a number",
        STEPS + "test_geoopt_adam_minimizes_when_told_to_maximize_and_we_climb",
        STEPS + "test_to_maximize_is_to_minimize_the_negative",
        PLUMBING + "test_capturable_is_refused_where_it_is_not_served",
        PLUMBING + "test_no_option_is_accepted_and_ignored",
        "test_literature_reference.py::test_maximizing_is_minimizing_the_negative",
    ),
    4: trap(
        "geoopt 0.5.1 RiemannianAdam(fused=True) tells GradScaler that it unscales by itself, and"
        " does not: NaN weights after an infinite gradient",
        "unscaling and skipping stay with the GradScaler, also with fused=True; 50 scaled steps "
        "are bitwise the unscaled ones",
        STEPS + "test_a_grad_scaler_changes_nothing_but_to_leave_infinite_steps_out",
        STEPS + "test_geoopt_fused_adam_writes_nan_under_a_grad_scaler",
        "test_constrain_handle.py::test_grad_scaler_scales_skips_and_unscales_as_without_constraint",
    ),
    5: trap(
        "adamp 0.3.0 SGDP projects its momentum buffer in place without Nesterov, since the "
        "update is the buffer, and not with it",
        "what a buffer holds depends on `transport` alone; `literature.SGDP` has the difference "
        "as an option",
        STEPS + "test_sgdp_projects_its_buffer_by_a_flag_and_ours_is_the_transports_alone",
        STEPS + "test_adamp_projects_the_buffer_without_nesterov_only",
        ADAMP + "test_the_buffer_is_projected_only_on_request_and_never_with_nesterov",
    ),
    6: trap(
        "adamp 0.3.0 takes a weight for scale-invariant by the cosine of one gradient: by chance "
        "on 8 % of steps, always for a zero gradient, never once L2 is a tenth of the gradient",
        "the model is read once, before training, and the gradients of the day do not matter",
        STEPS + "test_adamp_loses_sight_of_invariant_weights_under_l2_and_we_read_the_model",
        ADAMP + "test_the_condition_holds_by_chance_on_eight_percent_of_steps",
        ADAMP + "test_a_zero_gradient_counts_as_tangent_as_in_the_authors_code",
        "test_detect.py::test_l2_term_of_the_loss_is_seen_and_leaves_no_gradient",
    ),
    7: trap(
        "Emerging-Optimizers fd77292 ObliqueAdam divides by 1 - beta2^t where its root belongs: 3"
        " % of Adam's first step at 0.999. It takes every norm to be 1",
        "the moments are torch's own code, the first step is Adam's, and the norm is the block's "
        "own",
        STEPS + "test_oblique_adam_hides_a_warmup_and_ours_starts_with_adams_step",
        REFERENCE + "test_adam_follows_the_oracle",
    ),
    8: trap(
        "REQ bab824d centers rows when it is built: NaN for fan-in 1, for equal and for zero "
        "weights; a checkpoint loaded later is rescaled",
        "building an optimizer changes no weight, but for the published centering (the default of "
        "`literature.Rotational*`); norms are measured at the first step",
        PLUMBING + "test_construction_changes_no_weight_and_odd_ones_stay_finite",
        PLUMBING + "test_req_bug_the_first_norms_are_those_of_the_default_with_centering_too",
        PUBLISHED + "test_req_bug_weights_of_fan_in_one_and_equal_weights_are_not_nan",
        PUBLISHED + "test_req_bug_weights_loaded_after_construction_keep_their_norm",
        CONTRACT + "test_stored_norm_is_that_of_weights_loaded_before_the_first_step",
    ),
    9: trap(
        "REQ bab824d: decay 0 fails an assertion; its wrapper raises KeyError if one gradient is "
        "missing and TypeError on a closure; complex views are dict keys",
        "decay 0, missing gradients, closures and complex weights are ordinary cases",
        CONTRACT + "test_a_missing_gradient_is_no_step",
        PUBLISHED + "test_a_missing_gradient_is_no_step",
        CONTRACT + "test_closure_is_evaluated_with_gradients_and_its_loss_returned",
        PUBLISHED + "test_closure_is_evaluated_with_gradients_and_its_loss_returned",
        CONTRACT + "test_complex_weights_are_real_ones_of_twice_the_entries",
        "test_literature_errors.py::test_req_bug_without_decay_weights_are_ordinary_unless_a_group_says_otherwise",
        "test_constrain_handle.py::test_closures_see_to_their_gradients_themselves",
    ),
    10: trap(
        "REQ and Hyperball normalize the step, so that a block of vanishing gradients turns as "
        "fast as the others",
        "**here too** where lr is an angle (`rotate`, `hyperball`), on momentum alone as well; "
        "not with `retract`, `exp`, `renorm` and SGD. A gradient that is and was exactly zero "
        "moves nothing, and the rounding of a radial one is not amplified",
        STEPS + "test_vanishing_gradients_turn_a_sphere_where_lr_is_an_angle_and_only_there",
        "test_peer_traps.py::test_the_figures_of_the_page_on_gradients_that_vanish",
        CONTRACT + "test_rotate_does_not_amplify_the_rounding_of_a_radial_gradient",
        CONTRACT + "test_lr_zero_and_zero_gradient_leave_weights_bitwise",
        PAPERS + "test_a_row_of_vanishing_gradients_turns_as_fast_as_the_others",
    ),
    11: trap(
        "adamsrt f159b06 AdamG: channel_wise=True runs Adam per entry, and False the method",
        "`second_moment` gives what it names; `literature.AdamG` is Cho and Lee's",
        REFERENCE + "test_adam_follows_the_oracle",
        REFERENCE + "test_one_second_moment_per_sphere_keeps_the_direction_tangent",
        PLUMBING + "test_second_moments_are_as_many_as_their_name_says",
        "test_literature_reference.py::test_adam_g_and_geoopt_differ_by_the_transport_alone",
    ),
    12: trap(
        "Cho and Lee's PyTorch port overwrites `omega` by 0, and adds 1e-8 to norms: a step of "
        "1e-8 radians is halved",
        "`omega` counts; nothing is added to a norm",
        STEPS + "test_tiny_steps_keep_their_length",
        PAPERS + "test_cho_and_lee_bug_omega_of_the_constructor_makes_rows_orthogonal",
        PAPERS + "test_cho_and_lee_bug_tiny_steps_keep_their_length",
    ),
    13: trap(
        "pytorch_optimizer 4.1.0 SpectralSphere documents a retraction to R and makes none, with "
        "decay on by default",
        "every move ends on the sphere, from whatever norm; decay is 0 unless given",
        "test_moves.py::test_new_norm_is_the_radius_whatever_the_old_one",
        CONTRACT + "test_fixed_norm_holds_for_10000_float32_steps",
        PLUMBING + "test_no_sphere_optimizer_decays_by_default",
    ),
    14: trap(
        "McTorch afca03e ignores momentum and decay on manifold parameters without a word",
        "an option has an effect or is refused",
        PLUMBING + "test_no_option_is_accepted_and_ignored",
        "test_optim_errors.py::test_bad_options_say_what_to_do",
    ),
    15: trap(
        "levanter's AdamHR projects and then divides per entry, so that the step is not tangent; "
        "promises rows and takes the norm of the matrix; projects too little below norms of 1e-5",
        "the move takes the radial part out last; spheres are those of the spec; directions do "
        "not depend on the norm",
        CONTRACT + "test_the_tangent_step_has_no_radial_part",
        REFERENCE + "test_every_granularity_is_rows_of_the_right_matrix",
        STEPS + "test_directions_of_weights_of_norm_1e_minus_12_are_those_of_norm_1",
    ),
    16: trap(
        "levanter's AdamH and MuonH and modded-nanogpt read the radius from the rounded weights "
        "at every step: 15 % of a bfloat16 norm lost in 3000",
        "the radius is state, float64, in checkpoints",
        CONTRACT + "test_hyperball_bug_low_precision_norms_do_not_drift",
        PUBLISHED + "test_hyperball_bug_bfloat16_norms_do_not_drift",
        READS + "test_hyperball_bug_held_norms_are_those_of_the_first_step",
        "test_optim_checkpoint.py::test_wide_state_survives_a_checkpoint_of_bf16_weights",
    ),
    17: trap(
        "Emerging-Optimizers fd77292 rounds the scale factor of its HyperballHook to bfloat16: "
        "norms off by 4e-3",
        "factors are float32 or wider, and weights are rounded once",
        CONTRACT + "test_step_in_low_precision_is_rounded_once",
        PUBLISHED + "test_half_precision_is_widened_and_rounded_once",
        "test_geometry.py::test_bf16_scale_factors_are_not_rounded_to_bf16",
        "test_constrain.py::test_half_precision_is_scaled_by_an_unrounded_factor_and_rounded_once",
    ),
    18: trap(
        "steps of 1e-3 radians are mostly rounded away in bfloat16 weights, in any optimizer, "
        "silently",
        "a warning, and `rounding='stochastic'` or `'master'` ([low "
        "precision](low_precision.md)); the published optimizers have neither",
        PRECISION + "test_nearest_loses_most_of_a_small_step_and_says_so",
        PRECISION + "test_stochastic_and_master_make_the_angle_asked_for",
    ),
    19: trap(
        "one sphere for a whole tensor (Hyperball) does not bound its rows: their norms, and "
        "effective learning rates, drift apart",
        "true of any such sphere; for a network with per-filter norms the report gives rows, "
        "which cannot",
        STEPS + "test_a_sphere_of_the_whole_tensor_lets_its_rows_drift_apart_and_rows_do_not",
    ),
    20: trap(
        "adamp 0.3.0 is called projected and does not keep norms",
        "the sphere optimizers keep them; `literature.AdamP` says that it does not",
        ADAMP + "test_steps_are_orthogonal_and_slow_the_growth_of_norms",
        CONTRACT + "test_fixed_norm_holds_for_10000_float32_steps",
    ),
    21: trap(
        "division by a norm of zero: NaN in geoopt 0.5.1 projx, nGPT, torch's weight_norm and "
        "levanter's AdamH",
        "a zero sphere is a point that stays; a warning names the parameter",
        PLUMBING + "test_geoopt_projects_zero_to_nan_and_zero_is_a_point_that_stays_here",
        CONTRACT + "test_zero_norm_rows_stay_finite_and_are_reported_once",
        PUBLISHED + "test_zero_norm_rows_stay_finite",
        "test_geometry.py::test_zero_spheres_stay_zero_and_leave_the_others_alone",
        "test_constrain.py::test_spheres_of_norm_zero_are_told_once_and_stay_where_they_are",
    ),
    22: trap(
        "geoopt 0.5.1 SphereExact.expmap raises KeyError in half precision; angles by arc cosine "
        "are noise below 1e-4",
        "any dtype, computed in float32 or wider; angles by arc tangents",
        PLUMBING + "test_geoopt_has_no_exponential_map_in_half_precision_and_we_have",
        "test_geometry.py::test_every_granularity_shape_dtype_and_layout",
        "test_geometry.py::test_angle_keeps_its_digits_in_float32_where_an_arc_cosine_has_none",
    ),
    23: trap(
        "`.view` raises on channels_last weights: adamp 0.3.0, pytorch_optimizer 4.1.0 Nero",
        "dimensions are moved and split, never merged",
        CONTRACT + "test_any_layout_gives_the_contiguous_result",
        PUBLISHED + "test_any_layout_gives_the_contiguous_result",
        ADAMP + "test_authors_bug_channels_last_weights_are_stepped",
        "test_spheres.py::test_view_on_channels_last_is_not_a_silent_copy",
    ),
    24: trap(
        "a Python `if` on a device tensor waits for the device, once or twice per tensor and "
        "step: AdamP, Nero, spectral spheres",
        "no step reads a device tensor, but the first (is a norm zero?) and those that look for "
        "lost bfloat16 steps",
        READS + "test_adamp_waits_for_the_device_and_no_sphere_step_does",
        READS + "test_adamp_waits_for_the_device_and_no_published_step_does",
        READS + "test_adamp_waits_for_the_device_once_or_twice_per_tensor",
        "test_constrain_handle.py::test_a_held_step_never_waits_for_the_device",
    ),
    25: trap(
        "state that is no tensor (lists and sizes in adamsrt f159b06) does not survive strict "
        "checkpoints; a lost flag retakes the norm from trained weights",
        "state is tensors under fixed words, and goes through `weights_only` files and "
        "distributed checkpoints bit for bit",
        PLUMBING + "test_state_is_tensors_and_goes_through_distributed_checkpoints_bit_for_bit",
        "test_optim_checkpoint.py::test_resuming_equals_the_uninterrupted_run_bit_for_bit",
        PUBLISHED + "test_resuming_equals_the_uninterrupted_run_bit_for_bit",
    ),
    26: trap(
        "geoopt 0.5.1's ManifoldParameter cannot be loaded with weights_only=True; subclasses of "
        "Parameter break deepcopy and DDP",
        "there is no subclass: parameters are `nn.Parameter`, and what is known of them is in the"
        " groups",
        PLUMBING + "test_geoopt_parameters_cannot_be_loaded_as_weights_and_ours_are_torchs_own",
    ),
    27: trap(
        "storage replaced instead of written to breaks DDP and captured graphs (geoopt before "
        "0.3); Muon makes gradients of zeros where there are none",
        "weights keep their memory; a missing gradient stays missing",
        CONTRACT + "test_gradients_and_storage_stay_what_they_are",
        PUBLISHED + "test_gradients_and_storage_stay_what_they_are",
        CONTRACT + "test_a_missing_gradient_is_no_step",
        CONTRACT + "test_joint_sphere_with_one_gradient_missing_still_moves_as_a_whole",
    ),
    28: trap(
        "names and shapes decide what is constrained: substrings (levanter), rows = 3 columns for"
        " a packed QKV (AngularMuown), four dimensions for stacked layers",
        "only a report or a spec does; the published optimizers' own default, all matrices, is "
        "theirs",
        PLUMBING + "test_names_and_shapes_decide_nothing",
        "test_optim_muon.py::test_what_is_no_matrix_is_adamws_and_named",
    ),
    29: trap(
        "Adam's second moment has the wrong size after a change of norm, since gradients go with "
        "1/norm; only AdamSRT rescales it",
        "norms do not change; one written from outside costs a fixed radius one gradient and "
        "`free` nothing; radius schedules rescale; an unfrozen weight starts afresh",
        STEPS + "test_a_norm_that_changes_under_way_leaves_no_moments_of_the_wrong_size",
        STEPS + "test_a_weight_that_is_frozen_at_first_starts_as_if_the_optimizer_were_new",
        "test_radius_schedules.py::test_a_schedule_of_the_radius_is_the_schedule_of_lr",
        PAPERS + "test_adam_srt_carries_the_first_moment_and_rescales_both",
    ),
    30: trap(
        "averages of weights (EMA, SWA, schedule-free) are shorter than their spheres; nobody "
        "brings them back",
        "one line of `geometry` does, without a change of function; see below",
        PLUMBING + "test_averages_leave_the_sphere_and_come_back_without_a_change_of_function",
        "test_peer_traps.py::test_the_recipe_of_the_page_runs",
    ),
    31: trap(
        "eps, a bias in front of the norm, running statistics and clipping by the global norm "
        "make invariance approximate, and nobody says how much",
        "the report measures it at the model's own weights and eps; for clipping see below",
        PLUMBING + "test_the_report_measures_what_makes_invariance_approximate",
        "test_detect.py::test_real_eps_grows_as_weights_shrink",
        "test_optim_torch.py::test_evaluation_differs_by_the_running_statistics_only",
        STEPS + "test_clipping_by_the_global_norm_is_one_factor_on_lr_for_all_blocks",
        STEPS + "test_clipping_by_the_global_norm_does_not_change_an_angle",
    ),
    32: trap(
        "weights written to in the forward pass (EDM2) or recomputed at each access "
        "(parametrizations) fight compile, checkpointing and DDP",
        "weights change in `step()` only; modules get no hook and no parametrization",
        PLUMBING + "test_a_module_is_neither_hooked_nor_changed_by_its_forward",
    ),
    33: trap(
        "words that the code does not keep: AdamP as projection to the unit sphere (timm "
        "aa4b585); sqrt(lr*decay) as the angle of AdamW (levanter), 3.1 times too hot at beta1 = "
        "0.9",
        "`theory.equilibrium` is held against simulation, and every figure of the docs comes from"
        " a test or a script",
        STEPS + "test_the_rule_of_thumb_for_the_angle_of_adamw_is_three_times_too_hot",
        "test_theory_simulation.py::test_norm_and_angle_at_equilibrium",
        PAPERS + "test_which_is_the_angle_that_the_plain_optimizers_settle_at",
    ),
}

HEAD = """# Traps of other libraries

What we found in the code of other optimizers and tools for normalized networks, and what keeps it
from happening here: the tests named run with every change. Where a peer can be installed they show
its side too, in the version given; it may have mended its bug since. This page is written by
`python tests/peer_traps.py`.

| | trap | here |
|---|---|---|
"""

TAIL = """
## Gradients that vanish

Where `lr` is an angle, the length of the direction does not matter. A block whose gradients end, as
those of a filter behind a ReLU that has died, goes on turning by `lr` on what is left of its
momentum: SphereAdam at 0.01 for some 450 steps, by 4.5 rad in all, until that is too small for
float32. AdamW, and SphereAdam with `retract`, come to rest after 0.02 rad. A weight that never had
a gradient does not move.

## Averages of weights

The mean of points of a sphere lies inside it. For a scale-invariant weight that changes nothing but
its effective learning rate, should training go on from the average. This brings averages back to
the norms of the trained weights, and leaves the function alone:

```python
from sphereopt.geometry import exp, log

for name, sphere in report.spheres.items():
    if isinstance(name, str):  # members of a joint sphere, a tuple of names, are scaled as one
        point, mean = model.get_parameter(name), averaged.module.get_parameter(name)
        mean.data.copy_(exp(point.data, log(point.data, mean.data, sphere), sphere))
```

Then refresh the running statistics, by `torch.optim.swa_utils.update_bn`: they belong to the
shorter weights. Leave all other weights as they are: the norm of their average is part of the
function.

## Clipping by the global norm

`torch.nn.utils.clip_grad_norm_` before a step multiplies all gradients by one number. For SphereSGD
without momentum, with `retract`, `exp` or `renorm`, this is that number on `lr`, for all blocks of
the step. Where `lr` is an angle (`rotate`, `hyperball`) no angle changes: all it does is to give
this step's gradients less weight in the moments.
"""


def page() -> str:
    """Return the text of docs/traps.md."""
    rows = [
        f"| {number} | {row.peer} | {row.here}: {', '.join(f'`{test}`' for test in row.tests)} |\n"
        for number, row in TRAPS.items()
    ]
    return HEAD + "".join(rows) + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
