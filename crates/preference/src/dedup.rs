//! Deduplication of items, with indices.

use std::{collections::HashMap, hash::Hash};

/// Distinct items in the order of first insertion. A response that is part of several comparisons is thus
/// evaluated once.
pub(crate) struct Deduplicated<T> {
    items: Vec<T>,
    indices: HashMap<T, usize>,
}

impl<T> Default for Deduplicated<T> {
    fn default() -> Self {
        Self {
            items: Vec::new(),
            indices: HashMap::new(),
        }
    }
}

impl<T: Clone + Eq + Hash> Deduplicated<T> {
    /// Inserts `item` unless an equal one is present; returns its index.
    pub(crate) fn insert(&mut self, item: T) -> usize {
        let Self { items, indices } = self;
        *indices.entry(item).or_insert_with_key(|item| {
            items.push(item.clone());
            items.len() - 1
        })
    }

    /// The distinct items, by index.
    pub(crate) fn items(&self) -> &[T] {
        &self.items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_items_share_an_index() {
        let mut distinct = Deduplicated::default();
        let indices = ["b", "a", "b", "c", "a"].map(|item| distinct.insert(item));
        assert_eq!(indices, [0, 1, 0, 2, 1]);
        assert_eq!(distinct.items(), ["b", "a", "c"]);
    }
}
