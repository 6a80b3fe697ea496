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
        freeze_after: 0,
    }
}

fn game(seed: u64) -> Ganpo {
    let adamw = AdamWSettings {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 10.0,
    };
    Ganpo::new(&settings(), WIDTH, adamw, (Seed(seed), &Device::Cpu)).unwrap()
}

const LENGTHS: [usize; 6] = [2, 3, 1, 4, 3, 2];
const P: [f32; 3] = [0.9, 0.2, 1.0];

fn micro() -> MicroBatch<'static> {
    MicroBatch::of_lengths(&LENGTHS, &P)
}

/// Hidden states of 15 tokens about this middle.
fn hidden(seed: u32, middle: f32) -> Tensor {
    let wave = |i: u32| middle + ((i * i + 31 * seed * (i + 1)) as f32 * 0.731).sin();
    let numbers: Vec<f32> = (0..15 * WIDTH as u32).map(wave).collect();
    Tensor::from_vec(numbers, (15, WIDTH), &Device::Cpu).unwrap()
}

fn observed(policy: &Tensor, reference: &Tensor) -> Observed {
    Observed::new(&micro(), policy, reference).unwrap()
}

fn scalar(tensor: &Tensor) -> f64 {
    f64::from(tensor.to_scalar::<f32>().unwrap())
}

fn close(a: f64, b: f64, tolerance: f64) {
    assert!((a - b).abs() < tolerance, "{a} is not {b}");
}

#[test]
fn alike_policy_and_reference_cannot_be_told_apart_at_first() -> Result<()> {
    let mut game = game(1);
    let same = hidden(1, 0.0);
    let told = game
        .learn(&[observed(&same, &same)], 1e-3)
        .unwrap()
        .unwrap();
    // Streams of one side score alike and the means are the batch's own: two terms of four balance.
    close(told.loss, LN_2, 0.1);
    let term = game.term(&micro(), &same, 3.0).unwrap().unwrap();
    close(scalar(&term), LN_2, 0.1);
    Ok(())
}

#[test]
fn each_step_leaves_the_other_player_alone() -> Result<()> {
    let mut game = game(1);
    let policy = Var::from_tensor(&hidden(1, 0.0))?;
    let before = game.save().unwrap();
    // The policy's hidden states come with a graph; what is observed of them has none.
    let with_graph = (policy.as_tensor() * 1.0)?;
    let seen = observed(&with_graph, &hidden(2, 0.5));
    assert!(!seen.policy.stream(&[0], 8)?.tokens.track_op());
    game.learn(&[seen], 1e-3).unwrap().unwrap();
    let after = game.save().unwrap();
    assert_ne!(after.players, before.players);

    let term = game.term(&micro(), &with_graph, 3.0).unwrap().unwrap();
    let found = term.backward()?;
    for (name, var) in game.optimizer.vars() {
        assert!(found.get(var).is_none(), "{name} got a gradient");
    }
    let slopes = found.get(&policy).expect("the policy feels the game");
    assert!(slopes.sqr()?.sum_all()?.to_scalar::<f32>()? > 0.0);
    assert_eq!(game.save().unwrap(), after);
    Ok(())
}

#[test]
fn the_terms_gradient_is_that_of_finite_differences() -> Result<()> {
    let mut game = game(1);
    let (policy, reference) = (hidden(1, 0.0), hidden(2, 0.5));
    game.learn(&[observed(&policy, &reference)], 1e-3)
        .unwrap()
        .unwrap();
    let at = |hidden: &Tensor| scalar(&game.term(&micro(), hidden, 3.0).unwrap().unwrap());
    let var = Var::from_tensor(&policy)?;
    let found = game
        .term(&micro(), &var, 3.0)
        .unwrap()
        .unwrap()
        .backward()?;
    let slopes = found.get(&var).unwrap().flatten_all()?.to_vec1::<f32>()?;
    for place in [0, 7, 33, 61, 89] {
        let step = 1e-2;
        let moved = |by: f32| {
            let mut numbers = policy.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            numbers[place] += by;
            at(&Tensor::from_vec(numbers, (15, WIDTH), &Device::Cpu).unwrap())
        };
        let difference = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
        close(f64::from(slopes[place]), difference, 2e-4);
    }
    assert!(slopes.iter().any(|slope| slope.abs() > 1e-3), "{slopes:?}");
    Ok(())
}

#[test]
fn discriminators_learn_to_tell_and_the_policy_learns_to_pass() -> Result<()> {
    let mut game = game(1);
    let reference = hidden(2, 0.4);
    let mut policy = hidden(1, -0.4);
    let mut told = Vec::new();
    for _ in 0..60 {
        let seen = observed(&policy, &reference);
        told.push(game.learn(&[seen], 2e-2).unwrap().unwrap());
    }
    let (first, last) = (told[0], told[told.len() - 1]);
    // The second half of the loss asks the policy's to score above the reference's of the other side.
    assert!(last.loss < first.loss - 0.05, "{first:?} {last:?}");
    assert!(last.accuracy > 0.9, "{last:?}");
    let term = |policy: &Tensor| game.term(&micro(), policy, 3.0).unwrap().unwrap();
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

/// The game with its two discriminators exchanged.
fn exchanged(game: &Ganpo) -> Ganpo {
    let mut other = self::game(99);
    let exchange = |name: &str| match name.split_once('.') {
        Some(("chosen", rest)) => format!("rejected.{rest}"),
        Some((_, rest)) => format!("chosen.{rest}"),
        None => name.to_owned(),
    };
    let mut tensors = BTreeMap::new();
    for (name, _) in game.tensors() {
        tensors.insert(exchange(&name), game.weights.get(&name).unwrap());
    }
    other.optimizer.assign(&Weights::of(tensors)).unwrap();
    let vectors: BTreeMap<String, Tensor> = game.spectral.tensors().collect();
    let vector = |name: &str| Ok::<_, LearnerError>(vectors[&exchange(name)].clone());
    other.spectral.restore(vector).unwrap();
    other
}

#[test]
fn swapping_chosen_and_rejected_swaps_the_discriminators() {
    let mut game = game(1);
    let mut other = exchanged(&game);
    let (policy, reference) = (hidden(1, 0.0), hidden(2, 0.5));
    let upside_down = || MicroBatch::of_lengths(&LENGTHS, &P.map(|p| 1.0 - p));
    for _ in 0..3 {
        let one = game
            .learn(&[observed(&policy, &reference)], 1e-2)
            .unwrap()
            .unwrap();
        let seen = Observed::new(&upside_down(), &policy, &reference).unwrap();
        let two = other.learn(&[seen], 1e-2).unwrap().unwrap();
        close(one.loss, two.loss, 1e-6);
        close(one.accuracy, two.accuracy, 1e-6);
    }
    let (one, two) = (game.means.unwrap(), other.means.unwrap());
    // Sums over the same rows in another order.
    for (one, two) in [(one[0], two[1]), (one[1], two[0])] {
        for (one, two) in one.numbers().into_iter().zip(two.numbers()) {
            close(f64::from(one), f64::from(two), 1e-6);
        }
    }
    assert_ne!(one[0], one[1]);
    let of_one = game.term(&micro(), &policy, 3.0).unwrap().unwrap();
    let of_two = other.term(&upside_down(), &policy, 3.0).unwrap().unwrap();
    close(scalar(&of_one), scalar(&of_two), 1e-6);
}

#[test]
fn what_is_saved_goes_on_to_the_last_bit_and_a_refused_step_is_undone() {
    let mut whole = game(1);
    let pass = |step: u32| [observed(&hidden(step, 0.1), &hidden(7, 0.5))];
    for step in 0..3 {
        whole.learn(&pass(step), 1e-2).unwrap().unwrap();
    }
    let saved = whole.save().unwrap();
    let mut resumed = game(2);
    assert_ne!(resumed.save().unwrap(), saved);
    resumed.restore(&saved).unwrap();
    assert_eq!(resumed.save().unwrap(), saved);
    for step in 3..5 {
        let one = whole.learn(&pass(step), 1e-2).unwrap().unwrap();
        assert_eq!(resumed.learn(&pass(step), 1e-2).unwrap().unwrap(), one);
    }
    let reached = whole.save().unwrap();
    assert_eq!(resumed.save().unwrap(), reached);
    resumed.learn(&pass(5), 1e-2).unwrap().unwrap();
    assert_ne!(resumed.save().unwrap(), reached);
    resumed.undo().unwrap();
    assert_eq!(resumed.save().unwrap(), reached);
    // Undone once; there is no further back.
    resumed.undo().unwrap();
    assert_eq!(resumed.save().unwrap(), reached);

    let torn = Saved {
        players: saved.players[..saved.players.len() / 2].to_vec(),
        optimizer: saved.optimizer,
    };
    assert!(resumed.restore(&torn).is_err());
    assert_eq!(resumed.save().unwrap(), reached);
}

#[test]
fn a_batch_that_is_empty_or_not_finite_changes_nothing() {
    let mut game = game(1);
    let before = game.save().unwrap();
    let empty = MicroBatch::of_lengths(&LENGTHS, &[]);
    let (policy, reference) = (hidden(1, 0.0), hidden(2, 0.5));
    let seen = Observed::new(&empty, &policy, &reference).unwrap();
    assert_eq!(game.learn(&[seen], 1e-2).unwrap(), None);
    assert!(game.term(&empty, &policy, 1.0).unwrap().is_none());
    // Nothing was seen yet: the policy is not held against chance.
    assert!(game.term(&micro(), &policy, 3.0).unwrap().is_none());
    let broken = (&policy * f64::NAN).unwrap();
    assert_eq!(
        game.learn(&[observed(&broken, &reference)], 1e-2).unwrap(),
        None
    );
    assert_eq!(game.save().unwrap(), before);
}

#[test]
fn passes_add_up_to_the_batch() {
    let (policy, reference) = (hidden(1, 0.0), hidden(2, 0.5));
    let mut whole = game(1);
    let mut parted = game(1);
    let micros = [
        MicroBatch::of_lengths(&LENGTHS[..4], &P[..2]),
        MicroBatch::of_lengths(&LENGTHS[4..], &P[2..]),
    ];
    let tokens: usize = LENGTHS[..4].iter().sum();
    let part = |states: &Tensor, index: usize| {
        let (start, length) = [(0, tokens), (tokens, 15 - tokens)][index];
        states.narrow(0, start, length).unwrap()
    };
    let seen =
        [0, 1].map(|i| Observed::new(&micros[i], &part(&policy, i), &part(&reference, i)).unwrap());
    let one = whole.learn(&[observed(&policy, &reference)], 1e-2).unwrap();
    assert_eq!(parted.learn(&seen, 1e-2).unwrap(), one);
    assert_eq!(parted.save().unwrap(), whole.save().unwrap());
    let total = total(&micros);
    close(total, 3.0, 1e-6);
    let sum: f64 = [0, 1]
        .map(|i| {
            scalar(
                &parted
                    .term(&micros[i], &part(&policy, i), total)
                    .unwrap()
                    .unwrap(),
            )
        })
        .iter()
        .sum();
    close(
        sum,
        scalar(&whole.term(&micro(), &policy, total).unwrap().unwrap()),
        1e-6,
    );
}

#[test]
fn the_settings_say_when_and_how_wide() {
    let of = |warmup_steps, freeze_after| {
        let mut game = game(1);
        game.settings.warmup_steps = warmup_steps;
        game.settings.freeze_after = freeze_after;
        [0, 2, 5].map(|step| (game.learns(step), game.is_felt(step)))
    };
    assert_eq!(of(0, 0), [(true, true); 3]);
    assert_eq!(of(2, 0), [(true, false), (true, true), (true, true)]);
    assert_eq!(of(0, 5), [(true, true), (true, true), (false, true)]);
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
