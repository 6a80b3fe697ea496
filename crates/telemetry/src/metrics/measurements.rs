//! Named measurements of one step, for the journal and the exporter.

use std::borrow::Cow;

/// Map from metric name to value, in order of first insertion. The names are those of [`crate::METRICS`]; values may
/// be non-finite.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measurements {
    // About sixty entries a step: linear search is as fast as a tree, and keeps the order.
    values: Vec<(Cow<'static, str>, f64)>,
}

impl Measurements {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A map of names that differ from one another, which is not checked.
    pub(crate) fn of_distinct(values: Vec<(Cow<'static, str>, f64)>) -> Self {
        Self { values }
    }

    /// Inserts or replaces the value of `name`; a replaced value keeps its position.
    pub fn set(&mut self, name: impl Into<Cow<'static, str>>, value: f64) {
        let name = name.into();
        match self.values.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.values.push((name, value)),
        }
    }

    /// Inserts all values of `other`, which take precedence.
    pub fn merge(&mut self, other: Self) {
        for (name, value) in other.values {
            self.set(name, value);
        }
    }

    /// The value of `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.values
            .iter()
            .find(|(known, _)| known == name)
            .map(|&(_, value)| value)
    }

    /// Names and values, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, f64)> {
        self.values
            .iter()
            .map(|(name, value)| (name.as_ref(), *value))
    }

    /// Number of measurements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are no measurements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

impl<N: Into<Cow<'static, str>>> FromIterator<(N, f64)> for Measurements {
    fn from_iter<I: IntoIterator<Item = (N, f64)>>(values: I) -> Self {
        let mut measurements = Self::new();
        for (name, value) in values {
            measurements.set(name, value);
        }
        measurements
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_their_first_position_and_their_last_value() {
        let mut step: Measurements = [("loss", 1.0), ("tau", 0.1), ("loss", 2.0)]
            .into_iter()
            .collect();
        let rest: Measurements = [("beta", 0.5), ("tau", 0.2)].into_iter().collect();
        step.merge(rest);
        let expected = [("loss", 2.0), ("tau", 0.2), ("beta", 0.5)];
        assert_eq!(step.iter().collect::<Vec<_>>(), expected);
        assert_eq!(
            (step.get("beta"), step.get("eta"), step.len()),
            (Some(0.5), None, 3)
        );
    }
}
