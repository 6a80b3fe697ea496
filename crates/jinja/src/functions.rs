//! The functions that templates find without defining them: jinja2's and transformers'.

use std::{cell::RefCell, rc::Rc};

use crate::{
    Error,
    arguments::Given,
    clock, methods,
    value::{Range, Value},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Function {
    Range,
    Dict,
    Namespace,
    Cycler,
    Joiner,
    Lipsum,
    RaiseException,
    StrftimeNow,
}

/// The longest range of jinja2's sandbox.
const LONGEST_RANGE: i128 = 100_000;

impl Function {
    pub(crate) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "range" => Self::Range,
            "dict" => Self::Dict,
            "namespace" => Self::Namespace,
            "cycler" => Self::Cycler,
            "joiner" => Self::Joiner,
            "lipsum" => Self::Lipsum,
            "raise_exception" => Self::RaiseException,
            "strftime_now" => Self::StrftimeNow,
            _ => return None,
        })
    }

    pub(crate) fn call(self, given: Given) -> Result<Value, Error> {
        match self {
            Self::Range => range(given),
            Self::Dict => methods::dictionary(given).map(Value::dict),
            Self::Namespace => methods::namespace(given),
            Self::Cycler if given.positional.is_empty() => {
                Err(Error::new("at least one item has to be provided"))
            }
            Self::Cycler => Ok(Value::Cycler(Rc::new((given.positional, RefCell::new(0))))),
            Self::Joiner => {
                let given = given.bind("joiner", &["sep"])?;
                let separator = given.get(0).cloned().unwrap_or_else(|| ", ".into());
                Ok(Value::Joiner(Rc::new((separator, RefCell::new(false)))))
            }
            Self::Lipsum => Err(Error::unsupported("lipsum()")),
            Self::RaiseException => {
                let given = given.bind("raise_exception", &["message"])?;
                Err(Error::new(&*given.required(0)?.to_text()?))
            }
            Self::StrftimeNow => {
                let given = given.bind("strftime_now", &["format"])?;
                clock::strftime(given.text(0)?).map(Value::from)
            }
        }
    }
}

fn range(given: Given) -> Result<Value, Error> {
    let given = given.bind("range", &["start", "stop", "step"])?;
    given.required(0)?;
    let first = given.int(0, 0)?;
    let (start, stop) = match given.get(1) {
        None => (0, first),
        Some(_) => (first, given.int(1, 0)?),
    };
    let step = given.int(2, 1)?;
    if step == 0 {
        return Err(Error::new("range() arg 3 must not be zero"));
    }
    let range = Range { start, stop, step };
    if range.len() > LONGEST_RANGE {
        let message =
            format!("range too big, the sandbox blocks ranges larger than {LONGEST_RANGE}");
        return Err(Error::new(message));
    }
    Ok(Value::Range(range))
}
