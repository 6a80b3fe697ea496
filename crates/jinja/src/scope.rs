//! Nested variable scopes.

use std::{cell::RefCell, rc::Rc};

use crate::{limits, value::Value};

/// Variables that a lookup compares for one unit of work.
const VARIABLES_PER_UNIT: usize = 8;

/// Variables of a block, with a link to those of the enclosing block.
#[derive(Debug)]
pub(crate) struct Scope {
    variables: RefCell<Vec<(String, Value)>>,
    parent: Option<Rc<Scope>>,
}

impl Scope {
    /// An empty outermost scope.
    pub(crate) fn root() -> Rc<Self> {
        Rc::new(Self {
            variables: RefCell::default(),
            parent: None,
        })
    }

    /// An empty scope nested in this one.
    pub(crate) fn inner(self: &Rc<Self>) -> Rc<Self> {
        Rc::new(Self {
            variables: RefCell::default(),
            parent: Some(Rc::clone(self)),
        })
    }

    /// Value of a variable in the innermost scope that defines it.
    pub(crate) fn get(&self, name: &str) -> Option<Value> {
        let own = self.variables.borrow();
        if !limits::spend(own.len() / VARIABLES_PER_UNIT) {
            return None;
        }
        let found = own.iter().find(|(known, _)| known == name);
        match (found, &self.parent) {
            (Some((_, value)), _) => Some(value.clone()),
            (None, Some(parent)) => parent.get(name),
            (None, None) => None,
        }
    }

    /// Removes all variables of this scope.
    pub(crate) fn clear(&self) {
        self.variables.take();
    }

    /// Sets a variable of this scope.
    pub(crate) fn set(&self, name: &str, value: Value) {
        let mut own = self.variables.borrow_mut();
        if !limits::spend(own.len() / VARIABLES_PER_UNIT) {
            return;
        }
        match own.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => own.push((name.to_owned(), value)),
        }
    }
}
