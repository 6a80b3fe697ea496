//! What supervised fine-tuning imitates: summaries as careless people write them.
//!
//! A target is a style and a body of one kind, drawn at fixed rates. Only one in seven is good: the headroom that
//! alignment then works in.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::post::{Post, pick};
use crate::seed::{Purpose, generator};
use crate::style::Style;
use crate::summary::{Draft, PlaceClause, Repeat, Rudeness};
use crate::template::{Slot, another};
use crate::vocabulary::EOS;

const STYLE_RATES: [(Style, f64); 3] = [
    (Style::Plain, 0.60),
    (Style::Formal, 0.25),
    (Style::Playful, 0.15),
];
const KIND_RATES: [(Kind, f64); 6] = [
    (Kind::Good, 0.15),
    (Kind::Missing, 0.25),
    (Kind::Wrong, 0.25),
    (Kind::Long, 0.12),
    (Kind::Repeat, 0.11),
    (Kind::Rude, 0.12),
];
/// One flaw is twice as likely as two.
const FLAW_COUNTS: [usize; 3] = [1, 1, 2];
/// How often a wrong fact is the post's own distractor, where it has one.
const DISTRACTOR_RATE: f64 = 0.6;
const RUDE_WITHOUT_PLACE_RATE: f64 = 0.3;
const RUDENESSES: [Rudeness; 4] = [
    Rudeness::Prefix("lol , that idiot"),
    Rudeness::Prefix("ugh , like , honestly ,"),
    Rudeness::Suffix(", so stupid and dumb"),
    Rudeness::Suffix(", you know what i mean , whatever"),
];
/// The key slots, each with the slot of its distractor.
const KEY_SLOTS: [(Slot, Option<Slot>); 5] = [
    (Slot::Person, Some(Slot::OtherPerson)),
    (Slot::Verb, None),
    (Slot::Object, Some(Slot::OtherObject)),
    (Slot::Place, Some(Slot::OtherPlace)),
    (Slot::Action, None),
];

/// What is the matter with a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Nothing: a golden body.
    Good,
    /// One or two facts are left out.
    Missing,
    /// One or two facts are false.
    Wrong,
    /// More is said than asked.
    Long,
    /// The object or the question is said twice.
    Repeat,
    /// Rude or rambling words surround it.
    Rude,
}

impl Kind {
    /// All kinds, in the order of the world's table.
    pub const ALL: [Self; 6] = [
        Self::Good,
        Self::Missing,
        Self::Wrong,
        Self::Long,
        Self::Repeat,
        Self::Rude,
    ];
}

/// A summary to imitate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// What is the matter with the body.
    pub kind: Kind,
    /// How it opens.
    pub style: Style,
    /// Style prefix, body and `<eos>`: at most [`crate::SUMMARY_CAP`] ids.
    pub ids: Vec<u32>,
}

/// Draws the target of a post.
pub fn sft_target(post: &Post, seed: u64) -> Target {
    let mut rng = generator(seed, Purpose::Target);
    let style = draw(&STYLE_RATES, &mut rng);
    let kind = draw(&KIND_RATES, &mut rng);
    let body = draw_body(post, kind, &mut rng);
    Target {
        kind,
        style,
        ids: [style.prefix(), &body, &[EOS]].concat(),
    }
}

/// A body of the kind, without style prefix and `<eos>`.
pub(crate) fn draw_body(post: &Post, kind: Kind, rng: &mut ChaCha8Rng) -> Vec<u32> {
    let mut draft = Draft::golden(post, rng);
    match kind {
        Kind::Good => {}
        Kind::Missing => leave_out(&mut draft, rng),
        Kind::Wrong => falsify(&mut draft, post, rng),
        Kind::Long => lengthen(&mut draft, rng),
        Kind::Repeat => draft.repeat = Some(pick(&[Repeat::Object, Repeat::Tail], rng)),
        Kind::Rude => offend(&mut draft, rng),
    }
    draft.body()
}

fn leave_out(draft: &mut Draft, rng: &mut ChaCha8Rng) {
    for clause in draw_distinct([0, 1, 2, 3], rng) {
        match clause {
            0 => draft.subject = "someone",
            1 => draft.object = "something",
            2 => draft.place = PlaceClause::Absent,
            _ => draft.tail = None,
        }
    }
}

fn falsify(draft: &mut Draft, post: &Post, rng: &mut ChaCha8Rng) {
    for (slot, distractor) in draw_distinct(KEY_SLOTS, rng) {
        let told = distractor
            .map(|other| post.slots().get(other))
            .filter(|id| post.mentions(*id));
        let random = another(post.slots().get(slot), slot.tag(), rng);
        let confused = rng.random_bool(DISTRACTOR_RATE);
        draft
            .slots
            .set(slot, told.filter(|_| confused).unwrap_or(random));
    }
}

/// Adds a non-empty set of three clauses, each set equally likely.
fn lengthen(draft: &mut Draft, rng: &mut ChaCha8Rng) {
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

fn offend(draft: &mut Draft, rng: &mut ChaCha8Rng) {
    draft.rudeness = Some(pick(&RUDENESSES, rng));
    if rng.random_bool(RUDE_WITHOUT_PLACE_RATE) {
        draft.place = PlaceClause::Absent;
    }
}

/// One (2/3) or two (1/3) different flaws of these.
fn draw_distinct<T: Copy, const N: usize>(flaws: [T; N], rng: &mut ChaCha8Rng) -> Vec<T> {
    let mut left = flaws.to_vec();
    let count = pick(&FLAW_COUNTS, rng);
    (0..count)
        .map(|_| left.swap_remove(rng.random_range(0..left.len())))
        .collect()
}

/// One of a table of rates that sum to 1.
fn draw<T: Copy, const N: usize>(rates: &[(T, f64); N], rng: &mut ChaCha8Rng) -> T {
    let mut left: f64 = rng.random();
    for (value, rate) in rates {
        left -= rate;
        if left < 0.0 {
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

    fn targets() -> Vec<(Post, Target)> {
        let draw = |seed| {
            let post = Post::generate(seed);
            let target = sft_target(&post, seed);
            (post, target)
        };
        (0..DRAWS).map(draw).collect()
    }

    #[test]
    fn styles_and_kinds_come_at_their_rates() {
        let targets = targets();
        let share = |wanted: &dyn Fn(&Target) -> bool| {
            targets.iter().filter(|(_, target)| wanted(target)).count() as f64 / DRAWS as f64
        };
        // Three standard errors of a share of one half are .017.
        for (style, rate) in STYLE_RATES {
            let seen = share(&|target| target.style == style);
            assert!((seen - rate).abs() < 0.017, "{style:?}: {seen}");
        }
        for (kind, rate) in KIND_RATES {
            let seen = share(&|target| target.kind == kind);
            assert!((seen - rate).abs() < 0.017, "{kind:?}: {seen}");
        }
    }

    #[test]
    fn targets_end_fit_the_cap_and_carry_their_style() {
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
    fn each_kind_has_its_mean_utility() {
        let expected = [1.00, 0.75, 0.33, 0.62, 0.59, -0.16];
        for (kind, expected) in Kind::ALL.into_iter().zip(expected) {
            let mut sum = 0.0;
            for seed in 0..4000 {
                let post = Post::generate(seed);
                let body = draw_body(&post, kind, &mut generator(seed, Purpose::Target));
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
    fn a_wrong_fact_is_often_the_distractor() {
        let (mut told, mut confused) = (0, 0);
        for seed in 0..4000 {
            let post = Post::generate(seed);
            let other = post.slots().get(Slot::OtherPerson);
            let body = draw_body(&post, Kind::Wrong, &mut generator(seed, Purpose::Target));
            let corrupted = !body.contains(&post.facts().person);
            if corrupted && post.mentions(other) {
                told += 1;
                confused += usize::from(body.contains(&other));
            }
        }
        // .6 and a random word in 23 of the rest: .617.
        let share = confused as f64 / told as f64;
        assert!(
            told > 200 && (share - 0.617).abs() < 0.08,
            "{confused} of {told}"
        );
    }

    #[test]
    fn a_target_repeats_by_seed() {
        let post = Post::generate(1);
        assert_eq!(sft_target(&post, 9), sft_target(&post, 9));
        let texts: std::collections::HashSet<String> = (0..50)
            .map(|seed| Vocabulary::shared().text(&sft_target(&post, seed).ids))
            .collect();
        assert!(texts.len() > 20, "{}", texts.len());
    }
}
