//! The variable `loop`.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use crate::{ast::For, scope::Scope, value::Value};

/// State of a loop.
pub(crate) struct Loop {
    pub(crate) items: Rc<Vec<Value>>,
    pub(crate) index0: usize,
    pub(crate) depth0: usize,
    /// Maximum nesting depth of its items.
    pub(crate) depth: usize,
    /// Arguments of the last call of `changed`.
    pub(crate) last_changed: RefCell<Option<Vec<Value>>>,
    /// Definition and enclosing scope of a recursive loop.
    pub(crate) recursion: Option<(Arc<For>, Rc<Scope>)>,
}

impl Loop {
    pub(crate) fn index(&self) -> usize {
        self.index0 + 1
    }

    /// Value of `loop.name`, except methods.
    pub(crate) fn attribute(&self, name: &str) -> Option<Value> {
        let length = self.items.len();
        let number = |number: usize| Value::Int(number as i128);
        Some(match name {
            "index" => number(self.index0 + 1),
            "index0" => number(self.index0),
            "revindex" => number(length - self.index0),
            "revindex0" => number(length - self.index0 - 1),
            "first" => Value::Bool(self.index0 == 0),
            "last" => Value::Bool(self.index0 + 1 == length),
            "length" => number(length),
            "depth" => number(self.depth0 + 1),
            "depth0" => number(self.depth0),
            "previtem" => match self.index0.checked_sub(1) {
                Some(position) => self.items[position].clone(),
                None => Value::undefined("there is no previous item"),
            },
            "nextitem" => match self.items.get(self.index0 + 1) {
                Some(item) => item.clone(),
                None => Value::undefined("there is no next item"),
            },
            _ => return None,
        })
    }

    /// Whether the arguments differ from those of the last call.
    pub(crate) fn changed(&self, values: Vec<Value>) -> bool {
        let mut last = self.last_changed.borrow_mut();
        let is_same = last.as_ref().is_some_and(|last| {
            last.len() == values.len() && last.iter().zip(&values).all(|(l, r)| l.equals(r))
        });
        if !is_same {
            *last = Some(values);
        }
        !is_same
    }
}
