use std::f64::consts::LN_2;

use candle_core::{Result, Var};

use super::*;

const WIDTH: usize = 6;

fn settings() -> GanpoSettings {
    GanpoSettings {
        lambda: 1.0,
        hidden_size: 8,
        layers: 1,
        heads: 2,
        max_length: 8,
        momentum: 0.9,
        lr_ratio: 0.5,
        warmup_steps: 0,
        train_every: 1,
        freeze_after: 0,
    }
}

fn ganpo(seed: u64) -> Ganpo {
    let adamw = AdamWSettings {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 10.0,
    };
    Ganpo::new(&settings(), WIDTH, adamw, Seed(seed), &Device::Cpu).unwrap()
}

const LENGTHS: [usize; 6] = [2, 3, 1, 4, 3, 2];
const P: [f32; 3] = [0.9, 0.2, 1.0];

fn micro() -> MicroBatch<'static> {
    MicroBatch::of_lengths(&LENGTHS, &P)
}

/// Hidden states of 15 tokens with this mean.
fn hidden(seed: u32, mean: f32) -> Tensor {
    let wave = |i: u32| mean + ((i * i + 31 * seed * (i + 1)) as f32 * 0.731).sin();
    let values: Vec<f32> = (0..15 * WIDTH as u32).map(wave).collect();
    Tensor::from_vec(values, (15, WIDTH), &Device::Cpu).unwrap()
}

fn features(policy: &Tensor, reference: &Tensor) -> PassFeatures {
    PassFeatures::new(&micro(), policy, reference).unwrap()
}

fn scalar(tensor: &Tensor) -> f64 {
    f64::from(tensor.to_scalar::<f32>().unwrap())
}

fn close(a: f64, b: f64, tolerance: f64) {
    assert!((a - b).abs() < tolerance, "{a} is not {b}");
}

#[test]
fn equal_policy_and_reference_are_indistinguishable_at_first() -> Result<()> {
    let mut ganpo = ganpo(1);
    let same = hidden(1, 0.0);
    let metrics = ganpo
        .train(&[features(&same, &same)], 1e-3)
        .unwrap()
        .unwrap();
    // The streams of a side have equal scores and the means are the batch's own: two of four terms cancel.
    close(metrics.loss, LN_2, 0.1);
    let term = ganpo.generator_loss(&micro(), &same, 3.0).unwrap().unwrap();
    close(scalar(&term), LN_2, 0.1);
    Ok(())
}

#[test]
fn each_step_leaves_no_gradient_in_the_other_side() -> Result<()> {
    let mut ganpo = ganpo(1);
    let policy = Var::from_tensor(&hidden(1, 0.0))?;
    let before = ganpo.save().unwrap();
    // The policy's hidden states have a graph; the features have none.
    let with_graph = (policy.as_tensor() * 1.0)?;
    let pass = features(&with_graph, &hidden(2, 0.5));
    assert!(!pass.policy.stream(&[0], 8)?.tokens.track_op());
    ganpo.train(&[pass], 1e-3).unwrap().unwrap();
    let after = ganpo.save().unwrap();
    assert_ne!(after.discriminators, before.discriminators);

    let term = ganpo
        .generator_loss(&micro(), &with_graph, 3.0)
        .unwrap()
        .unwrap();
    let found = term.backward()?;
    for (name, var) in ganpo.optimizer.vars() {
        assert!(found.get(var).is_none(), "{name} got a gradient");
    }
    let slopes = found
        .get(&policy)
        .expect("the generator loss is differentiable in the policy");
    assert!(slopes.sqr()?.sum_all()?.to_scalar::<f32>()? > 0.0);
    assert_eq!(ganpo.save().unwrap(), after);
    Ok(())
}

#[test]
fn the_generator_gradient_agrees_with_finite_differences() -> Result<()> {
    let mut ganpo = ganpo(1);
    let (policy, reference) = (hidden(1, 0.0), hidden(2, 0.5));
    ganpo
        .train(&[features(&policy, &reference)], 1e-3)
        .unwrap()
        .unwrap();
    let at = |hidden: &Tensor| {
        scalar(
            &ganpo
                .generator_loss(&micro(), hidden, 3.0)
                .unwrap()
                .unwrap(),
        )
    };
    let var = Var::from_tensor(&policy)?;
    let found = ganpo
        .generator_loss(&micro(), &var, 3.0)
        .unwrap()
        .unwrap()
        .backward()?;
    let slopes = found.get(&var).unwrap().flatten_all()?.to_vec1::<f32>()?;
    for index in [0, 7, 33, 61, 89] {
        let step = 1e-2;
        let shifted = |by: f32| {
            let mut values = policy.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values[index] += by;
            at(&Tensor::from_vec(values, (15, WIDTH), &Device::Cpu).unwrap())
        };
        let difference = (shifted(step) - shifted(-step)) / (2.0 * f64::from(step));
        close(f64::from(slopes[index]), difference, 2e-4);
    }
    assert!(slopes.iter().any(|slope| slope.abs() > 1e-3), "{slopes:?}");
    Ok(())
}

#[test]
fn discriminators_learn_to_distinguish_and_the_policy_to_pass() -> Result<()> {
    let mut ganpo = ganpo(1);
    let reference = hidden(2, 0.4);
    let mut policy = hidden(1, -0.4);
    let mut metrics = Vec::new();
    for _ in 0..60 {
        let pass = features(&policy, &reference);
        metrics.push(ganpo.train(&[pass], 2e-2).unwrap().unwrap());
    }
    let (first, last) = (metrics[0], metrics[metrics.len() - 1]);
    // Half of the loss requires the policy's scores to exceed the reference's of the opposite side.
    assert!(last.loss < first.loss - 0.05, "{first:?} {last:?}");
    assert!(last.accuracy > 0.9, "{last:?}");
    let term = |policy: &Tensor| {
        ganpo
            .generator_loss(&micro(), policy, 3.0)
            .unwrap()
            .unwrap()
    };
    let before = scalar(&term(&policy));
    for _ in 0..100 {
        let var = Var::from_tensor(&policy)?;
        let found = term(&var).backward()?;
        policy = (policy - (found.get(&var).unwrap() * 0.3)?)?;
    }
    let after = scalar(&term(&policy));
    assert!(after < before - 0.1, "{before} {after}");
    Ok(())
}

/// A copy with the two discriminators exchanged.
fn exchanged(ganpo: &Ganpo) -> Ganpo {
    let mut other = self::ganpo(99);
    let exchange = |name: &str| match name.split_once('.') {
        Some(("chosen", rest)) => format!("rejected.{rest}"),
        Some((_, rest)) => format!("chosen.{rest}"),
        None => name.to_owned(),
    };
    let mut tensors = BTreeMap::new();
    for (name, _) in ganpo.tensors() {
        tensors.insert(exchange(&name), ganpo.weights.get(&name).unwrap());
    }
    other.optimizer.assign(&Weights::of(tensors)).unwrap();
    let vectors: BTreeMap<String, Tensor> = ganpo.spectral.tensors().collect();
    let vector = |name: &str| Ok::<_, LearnerError>(vectors[&exchange(name)].clone());
    other.spectral.restore(vector).unwrap();
    other
}

#[test]
fn swapping_chosen_and_rejected_swaps_the_discriminators() {
    let mut ganpo = ganpo(1);
    let mut other = exchanged(&ganpo);
    let (policy, reference) = (hidden(1, 0.0), hidden(2, 0.5));
    let flipped = || MicroBatch::of_lengths(&LENGTHS, &P.map(|p| 1.0 - p));
    for _ in 0..3 {
        let one = ganpo
            .train(&[features(&policy, &reference)], 1e-2)
            .unwrap()
            .unwrap();
        let pass = PassFeatures::new(&flipped(), &policy, &reference).unwrap();
        let two = other.train(&[pass], 1e-2).unwrap().unwrap();
        close(one.loss, two.loss, 1e-6);
        close(one.accuracy, two.accuracy, 1e-6);
    }
    let (one, two) = (ganpo.means.unwrap(), other.means.unwrap());
    // Sums over the same rows in another order.
    for (one, two) in [(one[0], two[1]), (one[1], two[0])] {
        for (one, two) in one.to_array().into_iter().zip(two.to_array()) {
            close(f64::from(one), f64::from(two), 1e-6);
        }
    }
    assert_ne!(one[0], one[1]);
    let of_one = ganpo
        .generator_loss(&micro(), &policy, 3.0)
        .unwrap()
        .unwrap();
    let of_two = other
        .generator_loss(&flipped(), &policy, 3.0)
        .unwrap()
        .unwrap();
    close(scalar(&of_one), scalar(&of_two), 1e-6);
}

#[test]
fn a_restored_state_continues_bit_by_bit_and_a_step_can_be_undone() {
    let mut whole = ganpo(1);
    let pass = |step: u32| [features(&hidden(step, 0.1), &hidden(7, 0.5))];
    for step in 0..3 {
        whole.train(&pass(step), 1e-2).unwrap().unwrap();
    }
    let saved = whole.save().unwrap();
    let mut resumed = ganpo(2);
    assert_ne!(resumed.save().unwrap(), saved);
    resumed.restore(&saved).unwrap();
    assert_eq!(resumed.save().unwrap(), saved);
    for step in 3..5 {
        let one = whole.train(&pass(step), 1e-2).unwrap().unwrap();
        assert_eq!(resumed.train(&pass(step), 1e-2).unwrap().unwrap(), one);
    }
    let reached = whole.save().unwrap();
    assert_eq!(resumed.save().unwrap(), reached);
    resumed.train(&pass(5), 1e-2).unwrap().unwrap();
    assert_ne!(resumed.save().unwrap(), reached);
    resumed.undo().unwrap();
    assert_eq!(resumed.save().unwrap(), reached);
    // Only one step can be undone.
    resumed.undo().unwrap();
    assert_eq!(resumed.save().unwrap(), reached);

    let truncated = GanpoState {
        discriminators: saved.discriminators[..saved.discriminators.len() / 2].to_vec(),
        optimizer: saved.optimizer,
    };
    assert!(resumed.restore(&truncated).is_err());
    assert_eq!(resumed.save().unwrap(), reached);
}

#[test]
fn an_empty_or_non_finite_batch_changes_nothing() {
    let mut ganpo = ganpo(1);
    let before = ganpo.save().unwrap();
    let empty = MicroBatch::of_lengths(&LENGTHS, &[]);
    let (policy, reference) = (hidden(1, 0.0), hidden(2, 0.5));
    let pass = PassFeatures::new(&empty, &policy, &reference).unwrap();
    assert_eq!(ganpo.train(&[pass], 1e-2).unwrap(), None);
    assert!(
        ganpo
            .generator_loss(&empty, &policy, 1.0)
            .unwrap()
            .is_none()
    );
    // Before the first step there is no generator loss.
    assert!(
        ganpo
            .generator_loss(&micro(), &policy, 3.0)
            .unwrap()
            .is_none()
    );
    let broken = (&policy * f64::NAN).unwrap();
    assert_eq!(
        ganpo.train(&[features(&broken, &reference)], 1e-2).unwrap(),
        None
    );
    assert_eq!(ganpo.save().unwrap(), before);
}

#[test]
fn passes_add_up_to_the_batch() {
    let (policy, reference) = (hidden(1, 0.0), hidden(2, 0.5));
    let mut whole = ganpo(1);
    let mut split = ganpo(1);
    let micros = [
        MicroBatch::of_lengths(&LENGTHS[..4], &P[..2]),
        MicroBatch::of_lengths(&LENGTHS[4..], &P[2..]),
    ];
    let tokens: usize = LENGTHS[..4].iter().sum();
    let part = |states: &Tensor, index: usize| {
        let (start, length) = [(0, tokens), (tokens, 15 - tokens)][index];
        states.narrow(0, start, length).unwrap()
    };
    let passes = [0, 1]
        .map(|i| PassFeatures::new(&micros[i], &part(&policy, i), &part(&reference, i)).unwrap());
    let one = whole.train(&[features(&policy, &reference)], 1e-2).unwrap();
    assert_eq!(split.train(&passes, 1e-2).unwrap(), one);
    assert_eq!(split.save().unwrap(), whole.save().unwrap());
    let total = total_weight(&micros);
    close(total, 3.0, 1e-6);
    let sum: f64 = [0, 1]
        .map(|i| {
            scalar(
                &split
                    .generator_loss(&micros[i], &part(&policy, i), total)
                    .unwrap()
                    .unwrap(),
            )
        })
        .iter()
        .sum();
    close(
        sum,
        scalar(
            &whole
                .generator_loss(&micro(), &policy, total)
                .unwrap()
                .unwrap(),
        ),
        1e-6,
    );
}

#[test]
fn the_settings_determine_schedule_and_width() {
    let of = |warmup_steps, freeze_after| {
        let mut ganpo = ganpo(1);
        ganpo.settings.warmup_steps = warmup_steps;
        ganpo.settings.freeze_after = freeze_after;
        [0, 2, 5].map(|step| (ganpo.trains_discriminators(step), ganpo.applies(step)))
    };
    assert_eq!(of(0, 0), [(true, true); 3]);
    assert_eq!(of(2, 0), [(true, false), (true, true), (true, true)]);
    assert_eq!(of(0, 5), [(true, true), (true, true), (false, true)]);
    let mut rare = ganpo(1);
    rare.settings.train_every = 4;
    rare.settings.warmup_steps = 2;
    let trained = (0..9).filter(|&step| rare.trains_discriminators(step));
    assert_eq!(trained.collect::<Vec<_>>(), [0, 1, 4, 8]);
    let widths = [
        (0, 96, 32),
        (0, 16, 16),
        (0, 1000, 248),
        (0, 4096, 512),
        (0, 3, 8),
        (64, 96, 64),
    ];
    for (hidden_size, features, expected) in widths {
        let settings = GanpoSettings {
            hidden_size,
            heads: 8,
            ..settings()
        };
        assert_eq!(width(&settings, features), expected);
    }
}
