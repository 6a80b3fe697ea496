//! Targets of supervised fine-tuning: summaries of mixed quality.
//!
//! A target is a style and a body of one kind, drawn at fixed rates. About one in seven is good, which leaves headroom
//! for preference optimisation.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::post::{Post, pick};
use crate::seed::{RngStream, generator};
use crate::style::Style;
use crate::summary::{Draft, PlaceClause, RepeatedClause, Rudeness};
use crate::template::{TemplateSlot, another};
use crate::vocabulary::EOS;

const STYLE_RATES: [(Style, f64); 3] = [
    (Style::Plain, 0.60),
    (Style::Formal, 0.25),
    (Style::Playful, 0.15),
];
const KIND_RATES: [(TargetKind, f64); 6] = [
    (TargetKind::Good, 0.15),
    (TargetKind::Missing, 0.25),
    (TargetKind::Wrong, 0.25),
    (TargetKind::Long, 0.12),
    (TargetKind::Repeat, 0.11),
    (TargetKind::Rude, 0.12),
];
/// Numbers of flaws, one chosen uniformly: one flaw is twice as likely as two.
const FLAW_COUNTS: [usize; 3] = [1, 1, 2];
/// Probability that a wrong fact is taken from the post's distractor, where it has one.
const DISTRACTOR_RATE: f64 = 0.6;
const RUDE_WITHOUT_PLACE_RATE: f64 = 0.3;
const RUDENESSES: [Rudeness; 4] = [
    Rudeness::Prefix("lol , that idiot"),
    Rudeness::Prefix("ugh , like , honestly ,"),
    Rudeness::Suffix(", so stupid and dumb"),
    Rudeness::Suffix(", you know what i mean , whatever"),
];
/// Key slots, each with the slot of its distractor.
const KEY_SLOTS: [(TemplateSlot, Option<TemplateSlot>); 5] = [
    (TemplateSlot::Person, Some(TemplateSlot::OtherPerson)),
    (TemplateSlot::Verb, None),
    (TemplateSlot::Object, Some(TemplateSlot::OtherObject)),
    (TemplateSlot::Place, Some(TemplateSlot::OtherPlace)),
    (TemplateSlot::Action, None),
];

/// Quality of a target's body: good, or the kind of its flaw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetKind {
    /// A golden body.
    Good,
    /// One or two facts are missing.
    Missing,
    /// One or two facts are wrong.
    Wrong,
    /// Irrelevant clauses are added.
    Long,
    /// The object or the question is repeated.
    Repeat,
    /// Rude or rambling words are added.
    Rude,
}

impl TargetKind {
    /// All kinds, in order of declaration.
    pub const ALL: [Self; 6] = [
        Self::Good,
        Self::Missing,
        Self::Wrong,
        Self::Long,
        Self::Repeat,
        Self::Rude,
    ];
}

/// A supervised target: a summary of a post.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SftTarget {
    /// Quality of the body.
    pub kind: TargetKind,
    /// Style of the prefix.
    pub style: Style,
    /// Style prefix, body and `<eos>`: at most [`crate::SUMMARY_CAP`] ids.
    pub ids: Vec<u32>,
}

/// Draws a supervised target for a post.
pub fn sft_target(post: &Post, seed: u64) -> SftTarget {
    let mut rng = generator(seed, RngStream::Target);
    let style = draw(&STYLE_RATES, &mut rng);
    let kind = draw(&KIND_RATES, &mut rng);
    let body = draw_body(post, kind, &mut rng);
    SftTarget {
        kind,
        style,
        ids: [style.prefix(), &body, &[EOS]].concat(),
    }
}

/// Draws a body of the kind, without style prefix and `<eos>`.
pub(crate) fn draw_body(post: &Post, kind: TargetKind, rng: &mut ChaCha8Rng) -> Vec<u32> {
    let mut draft = Draft::golden(post, rng);
    match kind {
        TargetKind::Good => {}
        TargetKind::Missing => drop_facts(&mut draft, rng),
        TargetKind::Wrong => corrupt_facts(&mut draft, post, rng),
        TargetKind::Long => add_clauses(&mut draft, rng),
        TargetKind::Repeat => {
            draft.repeat = Some(pick(&[RepeatedClause::Object, RepeatedClause::Tail], rng));
        }
        TargetKind::Rude => add_rudeness(&mut draft, rng),
    }
    draft.body()
}

fn drop_facts(draft: &mut Draft, rng: &mut ChaCha8Rng) {
    for clause in draw_distinct([0, 1, 2, 3], rng) {
        match clause {
            0 => draft.subject = "someone",
            1 => draft.object = "something",
            2 => draft.place = PlaceClause::Absent,
            _ => draft.tail = None,
        }
    }
}

fn corrupt_facts(draft: &mut Draft, post: &Post, rng: &mut ChaCha8Rng) {
    for (slot, distractor) in draw_distinct(KEY_SLOTS, rng) {
        let mentioned = distractor
            .map(|other| post.slots().get(other))
            .filter(|id| post.mentions(*id));
        let random = another(post.slots().get(slot), slot.tag(), rng);
        let use_distractor = rng.random_bool(DISTRACTOR_RATE);
        draft
            .slots
            .set(slot, mentioned.filter(|_| use_distractor).unwrap_or(random));
    }
}

/// Adds a uniformly drawn non-empty subset of three clauses.
fn add_clauses(draft: &mut Draft, rng: &mut ChaCha8Rng) {
    let chosen: u8 = rng.random_range(1..8);
    if chosen & 1 != 0 {
        if rng.random_bool(0.5) {
            draft.opening = Some("on T");
        } else {
            draft.extras.push("on T");
        }
    }
    if chosen & 2 != 0 {
        draft.extras.push("and feels F");
    }
    if chosen & 4 != 0 {
        draft.extras.push("and P2 was there too");
    }
}

fn add_rudeness(draft: &mut Draft, rng: &mut ChaCha8Rng) {
    draft.rudeness = Some(pick(&RUDENESSES, rng));
    if rng.random_bool(RUDE_WITHOUT_PLACE_RATE) {
        draft.place = PlaceClause::Absent;
    }
}

/// Draws one (probability 2/3) or two (1/3) distinct elements.
fn draw_distinct<T: Copy, const N: usize>(flaws: [T; N], rng: &mut ChaCha8Rng) -> Vec<T> {
    let mut remaining = flaws.to_vec();
    let count = pick(&FLAW_COUNTS, rng);
    (0..count)
        .map(|_| remaining.swap_remove(rng.random_range(0..remaining.len())))
        .collect()
}

/// Draws from a table of probabilities that sum to 1.
fn draw<T: Copy, const N: usize>(rates: &[(T, f64); N], rng: &mut ChaCha8Rng) -> T {
    let mut remaining: f64 = rng.random();
    for (value, rate) in rates {
        remaining -= rate;
        if remaining < 0.0 {
            return *value;
        }
    }
    rates[N - 1].0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gold::{SUMMARY_CAP, utility};
    use crate::style::style_of;
    use crate::vocabulary::Vocabulary;

    const DRAWS: u64 = 8000;

    fn targets() -> Vec<(Post, SftTarget)> {
        let draw = |seed| {
            let post = Post::generate(seed);
            let target = sft_target(&post, seed);
            (post, target)
        };
        (0..DRAWS).map(draw).collect()
    }

    #[test]
    fn styles_and_kinds_have_the_specified_rates() {
        let targets = targets();
        let share = |predicate: &dyn Fn(&SftTarget) -> bool| {
            targets
                .iter()
                .filter(|(_, target)| predicate(target))
                .count() as f64
                / DRAWS as f64
        };
        // Three standard errors of a share of one half are .017.
        for (style, rate) in STYLE_RATES {
            let observed = share(&|target| target.style == style);
            assert!((observed - rate).abs() < 0.017, "{style:?}: {observed}");
        }
        for (kind, rate) in KIND_RATES {
            let observed = share(&|target| target.kind == kind);
            assert!((observed - rate).abs() < 0.017, "{kind:?}: {observed}");
        }
    }

    #[test]
    fn targets_end_with_eos_fit_the_cap_and_open_in_their_style() {
        let mut longest = 0;
        for (_, target) in targets() {
            assert_eq!(
                target.ids.iter().position(|id| *id == EOS),
                Some(target.ids.len() - 1)
            );
            assert_eq!(style_of(&target.ids), target.style);
            longest = longest.max(target.ids.len());
        }
        assert_eq!(longest, SUMMARY_CAP);
    }

    #[test]
    fn each_kind_has_the_expected_mean_utility() {
        let expected = [1.00, 0.75, 0.33, 0.62, 0.59, -0.16];
        for (kind, expected) in TargetKind::ALL.into_iter().zip(expected) {
            let mut sum = 0.0;
            for seed in 0..4000 {
                let post = Post::generate(seed);
                let body = draw_body(&post, kind, &mut generator(seed, RngStream::Target));
                sum += utility(post.facts(), &body, true).value;
            }
            let mean = sum / 4000.0;
            // Three standard errors of such a mean are about .02.
            assert!(
                (mean - expected).abs() < 0.02,
                "{kind:?}: mean utility {mean}, expected {expected}"
            );
        }
    }

    #[test]
    fn wrong_facts_are_often_taken_from_the_distractor() {
        let (mut eligible, mut distracted) = (0, 0);
        for seed in 0..4000 {
            let post = Post::generate(seed);
            let other = post.slots().get(TemplateSlot::OtherPerson);
            let body = draw_body(
                &post,
                TargetKind::Wrong,
                &mut generator(seed, RngStream::Target),
            );
            let corrupted = !body.contains(&post.facts().person);
            if corrupted && post.mentions(other) {
                eligible += 1;
                distracted += usize::from(body.contains(&other));
            }
        }
        // .6 plus 1/23 of the remaining .4, drawn uniformly: .617.
        let share = distracted as f64 / eligible as f64;
        assert!(
            eligible > 200 && (share - 0.617).abs() < 0.08,
            "{distracted} of {eligible}"
        );
    }

    #[test]
    fn a_target_is_a_function_of_its_seed() {
        let post = Post::generate(1);
        assert_eq!(sft_target(&post, 9), sft_target(&post, 9));
        let texts: std::collections::HashSet<String> = (0..50)
            .map(|seed| Vocabulary::shared().text(&sft_target(&post, seed).ids))
            .collect();
        assert!(texts.len() > 20, "{}", texts.len());
    }
}
