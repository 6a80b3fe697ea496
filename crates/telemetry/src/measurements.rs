//! Named numbers on their way from where they are measured to the journal and the exporter.

use std::borrow::Cow;

/// Names and numbers in the order in which the names were first set. The names are those of
/// [`crate::METRICS`]; a number may be non-finite, and then it is shown as such.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measurements {
    // A step has some sixty measurements: a list is searched as fast as a tree, and keeps the order.
    values: Vec<(Cow<'static, str>, f64)>,
}

impl Measurements {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `name`, in its old place when it had one.
    pub fn set(&mut self, name: impl Into<Cow<'static, str>>, value: f64) {
        let name = name.into();
        match self.values.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.values.push((name, value)),
        }
    }

    /// Sets everything that `other` holds: where both have a name, the number of `other` stays.
    pub fn merge(&mut self, other: Self) {
        for (name, value) in other.values {
            self.set(name, value);
        }
    }

    /// The number of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.values
            .iter()
            .find(|(known, _)| known == name)
            .map(|&(_, value)| value)
    }

    /// Names and numbers, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, f64)> {
        self.values
            .iter()
            .map(|(name, value)| (name.as_ref(), *value))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none.
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
    fn names_keep_their_first_place_and_their_last_number() {
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
