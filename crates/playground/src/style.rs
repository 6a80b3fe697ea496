//! Styles: three ways to open a summary, and the cycle in which people prefer them.
//!
//! Formal beats plain, playful beats formal, plain beats playful: no scalar reward can say that. The style is
//! carried by the first two tokens alone and is worth nothing in utility.

use std::sync::LazyLock;

use crate::template::word;

/// How a summary opens.
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
    /// All styles, in the order in which mixes list them.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Formal, Self::Playful];

    /// The ids that open a summary of this style: none or two.
    pub fn prefix(self) -> &'static [u32] {
        match self {
            Self::Plain => &[],
            Self::Formal => FORMAL.as_slice(),
            Self::Playful => PLAYFUL.as_slice(),
        }
    }

    /// The cycle: +1 if this style beats the other, −1 if it is beaten, 0 against itself.
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

/// The style of a summary, from its first two ids.
pub fn style_of(summary_ids: &[u32]) -> Style {
    let named = [Style::Formal, Style::Playful];
    let found = named
        .into_iter()
        .find(|style| summary_ids.starts_with(style.prefix()));
    found.unwrap_or(Style::Plain)
}

/// The probability that a style is preferred to another at equal utility: σ(cycle · S).
pub fn style_preference(style: Style, other: Style, cycle: f64) -> f64 {
    sigmoid(cycle * style.beats(other))
}

/// The best win rate that a single style reaches against a mix (plain, formal, playful; summing to 1) at equal
/// utility: ½ at the Nash equilibrium, more the more a mix can be exploited.
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
    use crate::fixed_point;

    #[test]
    fn the_first_two_tokens_are_the_style() {
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
    fn styles_form_a_cycle() {
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
    fn exploitability_of_known_mixes() {
        let third = 1.0 / 3.0;
        for (mix, cycle, expected) in [
            ([0.62, 0.24, 0.14], 1.0, 0.611),
            ([0.62, 0.24, 0.14], 2.0, 0.683),
            ([0.0, 1.0, 0.0], 1.0, 0.731),
            ([0.0, 1.0, 0.0], 2.0, 0.881),
            ([third, third, third], 2.0, 0.5),
            ([0.62, 0.24, 0.14], 0.0, 0.5),
        ] {
            let seen = exploitability(mix, cycle);
            assert!((seen - expected).abs() < 6e-4, "{mix:?} {cycle}: {seen}");
        }
    }

    #[test]
    fn the_regularised_equilibrium_of_styles_is_the_published_one() {
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
