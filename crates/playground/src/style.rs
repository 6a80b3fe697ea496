//! Styles of a summary, and the cyclic preference among them.
//!
//! Formal beats plain, playful beats formal, plain beats playful: an intransitive preference that no scalar reward can
//! represent. The style is determined by the first two tokens and has no utility.

use std::sync::LazyLock;

use crate::template::word;

/// Style of a summary, given by its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Style {
    /// No prefix.
    Plain,
    /// `summary :`
    Formal,
    /// `oops !`
    Playful,
}

static FORMAL: LazyLock<[u32; 2]> = LazyLock::new(|| [word("summary"), word(":")]);
static PLAYFUL: LazyLock<[u32; 2]> = LazyLock::new(|| [word("oops"), word("!")]);

impl Style {
    /// All styles, in the order of the entries of a mix.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Formal, Self::Playful];

    /// Prefix of the style: zero or two token ids.
    pub fn prefix(self) -> &'static [u32] {
        match self {
            Self::Plain => &[],
            Self::Formal => FORMAL.as_slice(),
            Self::Playful => PLAYFUL.as_slice(),
        }
    }

    /// Entry S of the cyclic preference: +1 if this style beats the other, −1 if it loses, 0 against itself.
    pub fn beats(self, other: Self) -> f64 {
        match (self, other) {
            (Self::Formal, Self::Plain)
            | (Self::Playful, Self::Formal)
            | (Self::Plain, Self::Playful) => 1.0,
            _ if self == other => 0.0,
            _ => -1.0,
        }
    }
}

/// The style of a summary, read from its first two ids.
pub fn style_of(summary_ids: &[u32]) -> Style {
    let named = [Style::Formal, Style::Playful];
    let found = named
        .into_iter()
        .find(|style| summary_ids.starts_with(style.prefix()));
    found.unwrap_or(Style::Plain)
}

/// Probability that a style is preferred to another at equal utility: σ(cycle · S).
pub fn style_preference(style: Style, other: Style, cycle: f64) -> f64 {
    sigmoid(cycle * style.beats(other))
}

/// Exploitability of a mix (plain, formal, playful; summing to 1) at equal utility: the best win rate of a single style
/// against it. ½ at the Nash equilibrium, larger elsewhere.
pub fn exploitability(mix: [f64; 3], cycle: f64) -> f64 {
    let win_rate = |style: Style| -> f64 {
        Style::ALL
            .iter()
            .zip(mix)
            .map(|(other, share)| share * style_preference(style, *other, cycle))
            .sum()
    };
    Style::ALL
        .into_iter()
        .map(win_rate)
        .fold(f64::NEG_INFINITY, f64::max)
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixed_point::fixed_point;

    #[test]
    fn the_first_two_tokens_determine_the_style() {
        for (text, style) in [
            ("summary : ana", Style::Formal),
            ("oops !", Style::Playful),
            ("ana lost", Style::Plain),
            ("summary ana", Style::Plain),
            ("ana summary :", Style::Plain),
            ("oops", Style::Plain),
        ] {
            let ids: Vec<u32> = text.split(' ').map(word).collect();
            assert_eq!(style_of(&ids), style, "{text}");
        }
        assert_eq!(style_of(&[]), Style::Plain);
    }

    #[test]
    fn the_preference_among_styles_is_cyclic() {
        assert_eq!(Style::Formal.beats(Style::Plain), 1.0);
        assert_eq!(Style::Playful.beats(Style::Formal), 1.0);
        assert_eq!(Style::Plain.beats(Style::Playful), 1.0);
        for (style, other) in Style::ALL
            .into_iter()
            .flat_map(|s| Style::ALL.map(|o| (s, o)))
        {
            assert_eq!(style.beats(other), -other.beats(style));
        }
    }

    #[test]
    fn exploitability_matches_known_mixes() {
        let third = 1.0 / 3.0;
        for (mix, cycle, expected) in [
            ([0.62, 0.24, 0.14], 1.0, 0.611),
            ([0.62, 0.24, 0.14], 2.0, 0.683),
            ([0.0, 1.0, 0.0], 1.0, 0.731),
            ([0.0, 1.0, 0.0], 2.0, 0.881),
            ([third, third, third], 2.0, 0.5),
            ([0.62, 0.24, 0.14], 0.0, 0.5),
        ] {
            let actual = exploitability(mix, cycle);
            assert!(
                (actual - expected).abs() < 6e-4,
                "{mix:?} {cycle}: {actual}"
            );
        }
    }

    #[test]
    fn the_regularised_equilibrium_of_styles_matches_the_published_one() {
        for (cycle, tau, expected) in [
            (1.0, 0.1, [0.385, 0.437, 0.178]),
            (1.0, 0.05, [0.332, 0.420, 0.248]),
            (2.0, 0.1, [0.341, 0.429, 0.230]),
            (2.0, 0.05, [0.324, 0.393, 0.283]),
        ] {
            let matrix =
                Style::ALL.map(|s| Style::ALL.map(|o| style_preference(s, o, cycle)).to_vec());
            let mix = fixed_point(&matrix, &[0.62, 0.24, 0.14], tau, 0.0).unwrap();
            for (share, expected) in mix.iter().zip(expected) {
                assert!((share - expected).abs() < 2e-3, "{cycle} {tau}: {mix:?}");
            }
        }
    }
}
