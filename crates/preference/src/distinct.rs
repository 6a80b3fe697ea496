//! Things of which equals are kept once.

use std::{collections::HashMap, hash::Hash};

/// What was placed, in the order of first placing. A judge reads a response that stands in several
/// comparisons once.
pub(crate) struct Distinct<T> {
    items: Vec<T>,
    places: HashMap<T, usize>,
}

impl<T> Default for Distinct<T> {
    fn default() -> Self {
        Self {
            items: Vec::new(),
            places: HashMap::new(),
        }
    }
}

impl<T: Clone + Eq + Hash> Distinct<T> {
    /// The place of `item`, or of its equal that came before.
    pub(crate) fn place(&mut self, item: T) -> usize {
        let Self { items, places } = self;
        *places.entry(item).or_insert_with_key(|item| {
            items.push(item.clone());
            items.len() - 1
        })
    }

    /// Everything once, by place.
    pub(crate) fn items(&self) -> &[T] {
        &self.items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_share_a_place() {
        let mut distinct = Distinct::default();
        let places = ["b", "a", "b", "c", "a"].map(|item| distinct.place(item));
        assert_eq!(places, [0, 1, 0, 2, 1]);
        assert_eq!(distinct.items(), ["b", "a", "c"]);
    }
}
