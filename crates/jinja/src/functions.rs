//! Global functions of jinja2 and transformers.

use std::{cell::Cell, rc::Rc};

use crate::{
    arguments::CallArguments,
    clock,
    error::TemplateError,
    methods,
    value::{Cycler, Range, Value},
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

/// Maximum length of a range, as in jinja2's sandbox.
const MAX_RANGE: i128 = 100_000;

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

    pub(crate) fn call(self, args: CallArguments) -> Result<Value, TemplateError> {
        match self {
            Self::Range => range(args),
            Self::Dict => methods::dictionary(args).map(Value::dict),
            Self::Namespace => methods::namespace(args),
            Self::Cycler if args.positional.is_empty() => {
                Err(TemplateError::new("at least one item has to be provided"))
            }
            Self::Cycler => Ok(Value::Cycler(Rc::new(Cycler::new(args.positional)))),
            Self::Joiner => {
                let args = args.bind("joiner", &["sep"])?;
                let separator = args.get(0).cloned().unwrap_or_else(|| ", ".into());
                Ok(Value::Joiner(Rc::new((separator, Cell::new(false)))))
            }
            Self::Lipsum => Err(TemplateError::unsupported("lipsum()")),
            Self::RaiseException => {
                let args = args.bind("raise_exception", &["message"])?;
                Err(TemplateError::new(&*args.required(0)?.to_text()?))
            }
            Self::StrftimeNow => {
                let args = args.bind("strftime_now", &["format"])?;
                clock::strftime(args.text(0)?).map(Value::from)
            }
        }
    }
}

fn range(args: CallArguments) -> Result<Value, TemplateError> {
    let args = args.bind("range", &["start", "stop", "step"])?;
    args.required(0)?;
    let first = args.int(0, 0)?;
    let (start, stop) = match args.get(1) {
        None => (0, first),
        Some(_) => (first, args.int(1, 0)?),
    };
    let step = args.int(2, 1)?;
    if step == 0 {
        return Err(TemplateError::new("range() arg 3 must not be zero"));
    }
    let range = Range { start, stop, step };
    if range.checked_len().is_none_or(|length| length > MAX_RANGE) {
        let message = format!("range too big, the sandbox blocks ranges larger than {MAX_RANGE}");
        return Err(TemplateError::new(message));
    }
    Ok(Value::Range(range))
}
