//! The arguments of a call, and how a function written here takes them.

use crate::{Error, value::Value};

/// Evaluated arguments.
#[derive(Debug, Clone, Default)]
pub(crate) struct Given {
    pub(crate) positional: Vec<Value>,
    pub(crate) named: Vec<(String, Value)>,
}

/// Arguments in the order of a function's parameters.
pub(crate) struct Bound {
    function: &'static str,
    parameters: &'static [&'static str],
    values: Vec<Option<Value>>,
}

impl Given {
    /// Matches the arguments with these parameters.
    ///
    /// # Errors
    /// When there are too many, or one has another name or comes twice.
    pub(crate) fn bind(
        self,
        function: &'static str,
        parameters: &'static [&'static str],
    ) -> Result<Bound, Error> {
        if self.positional.len() > parameters.len() {
            let (most, given) = (parameters.len(), self.positional.len());
            let message = format!("{function}() takes at most {most} arguments ({given} given)");
            return Err(Error::new(message));
        }
        let mut values: Vec<_> = self.positional.into_iter().map(Some).collect();
        values.resize(parameters.len(), None);
        for (name, value) in self.named {
            let place = parameters.iter().position(|parameter| *parameter == name);
            let Some(place) = place else {
                let message = format!("{function}() got an unexpected keyword argument '{name}'");
                return Err(Error::new(message));
            };
            if values[place].replace(value).is_some() {
                let message = format!("{function}() got multiple values for argument '{name}'");
                return Err(Error::new(message));
            }
        }
        Ok(Bound {
            function,
            parameters,
            values,
        })
    }
}

impl Bound {
    /// The argument at `place`, if it was given.
    pub(crate) fn get(&self, place: usize) -> Option<&Value> {
        self.values[place].as_ref()
    }

    /// The argument at `place`, if it was given and is not `None`.
    pub(crate) fn some(&self, place: usize) -> Option<&Value> {
        self.get(place)
            .filter(|value| !matches!(value, Value::None))
    }

    pub(crate) fn required(&self, place: usize) -> Result<&Value, Error> {
        self.get(place).ok_or_else(|| {
            let (function, name) = (self.function, self.parameters[place]);
            Error::new(format!("{function}() missing required argument: '{name}'"))
        })
    }

    pub(crate) fn is_true(&self, place: usize) -> bool {
        self.get(place).is_some_and(Value::is_true)
    }

    /// The integer at `place`, else `default`.
    pub(crate) fn int(&self, place: usize, default: i128) -> Result<i128, Error> {
        match self.get(place) {
            None => Ok(default),
            Some(value) => self.as_int(value),
        }
    }

    /// The integer at `place`, if it was given and is not `None`.
    pub(crate) fn some_int(&self, place: usize) -> Result<Option<i128>, Error> {
        self.some(place).map(|value| self.as_int(value)).transpose()
    }

    fn as_int(&self, value: &Value) -> Result<i128, Error> {
        value.must_be_defined()?;
        value.as_int().ok_or_else(|| {
            let name = value.type_name();
            Error::new(format!(
                "{}(): '{name}' object cannot be interpreted as an integer",
                self.function
            ))
        })
    }

    /// The string at `place`, if it was given and is not `None`.
    pub(crate) fn some_text(&self, place: usize) -> Result<Option<&str>, Error> {
        self.some(place)
            .map(|value| self.as_text(value))
            .transpose()
    }

    /// The string at `place`.
    pub(crate) fn text(&self, place: usize) -> Result<&str, Error> {
        self.as_text(self.required(place)?)
    }

    fn as_text<'a>(&self, value: &'a Value) -> Result<&'a str, Error> {
        value.must_be_defined()?;
        value.as_str().ok_or_else(|| {
            let name = value.type_name();
            Error::new(format!(
                "{}() argument must be str, not {name}",
                self.function
            ))
        })
    }
}
