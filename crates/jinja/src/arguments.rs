//! Evaluated arguments of a call, and binding them to the parameters of built-in functions.

use crate::{error::TemplateError, value::Value};

/// Evaluated arguments of a call.
#[derive(Debug, Clone, Default)]
pub(crate) struct CallArguments {
    pub(crate) positional: Vec<Value>,
    pub(crate) named: Vec<(String, Value)>,
}

/// Arguments bound to the parameters of a function, in order.
pub(crate) struct BoundArguments {
    function: &'static str,
    parameters: &'static [&'static str],
    values: Vec<Option<Value>>,
}

impl CallArguments {
    /// Work units of an operation that goes through every argument once.
    pub(crate) fn work(&self) -> usize {
        let named = self.named.iter().map(|(_, value)| value);
        let units = self.positional.iter().chain(named).map(Value::work);
        units.fold(0, usize::saturating_add)
    }

    /// Binds the arguments to these parameters.
    ///
    /// # Errors
    /// If there are too many arguments, or one has an unknown name or is given twice.
    pub(crate) fn bind(
        self,
        function: &'static str,
        parameters: &'static [&'static str],
    ) -> Result<BoundArguments, TemplateError> {
        if self.positional.len() > parameters.len() {
            let (maximum, count) = (parameters.len(), self.positional.len());
            let message = format!("{function}() takes at most {maximum} arguments ({count} given)");
            return Err(TemplateError::new(message));
        }
        let mut values: Vec<_> = self.positional.into_iter().map(Some).collect();
        values.resize(parameters.len(), None);
        for (name, value) in self.named {
            let position = parameters.iter().position(|parameter| *parameter == name);
            let Some(position) = position else {
                let message = format!("{function}() got an unexpected keyword argument '{name}'");
                return Err(TemplateError::new(message));
            };
            if values[position].replace(value).is_some() {
                let message = format!("{function}() got multiple values for argument '{name}'");
                return Err(TemplateError::new(message));
            }
        }
        Ok(BoundArguments {
            function,
            parameters,
            values,
        })
    }
}

impl BoundArguments {
    /// The argument at an index, if present.
    pub(crate) fn get(&self, position: usize) -> Option<&Value> {
        self.values[position].as_ref()
    }

    /// The argument at an index, if present and not `None`.
    pub(crate) fn some(&self, position: usize) -> Option<&Value> {
        self.get(position)
            .filter(|value| !matches!(value, Value::None))
    }

    pub(crate) fn required(&self, position: usize) -> Result<&Value, TemplateError> {
        self.get(position).ok_or_else(|| {
            let (function, name) = (self.function, self.parameters[position]);
            TemplateError::new(format!("{function}() missing required argument: '{name}'"))
        })
    }

    pub(crate) fn is_true(&self, position: usize) -> bool {
        self.get(position).is_some_and(Value::is_true)
    }

    /// The integer at an index, or `default`.
    pub(crate) fn int(&self, position: usize, default: i128) -> Result<i128, TemplateError> {
        match self.get(position) {
            None => Ok(default),
            Some(value) => self.as_int(value),
        }
    }

    /// The integer at an index, if present and not `None`.
    pub(crate) fn some_int(&self, position: usize) -> Result<Option<i128>, TemplateError> {
        self.some(position)
            .map(|value| self.as_int(value))
            .transpose()
    }

    fn as_int(&self, value: &Value) -> Result<i128, TemplateError> {
        value.must_be_defined()?;
        value.as_int().ok_or_else(|| {
            let name = value.type_name();
            TemplateError::new(format!(
                "{}(): '{name}' object cannot be interpreted as an integer",
                self.function
            ))
        })
    }

    /// The string at an index, if present and not `None`.
    pub(crate) fn some_text(&self, position: usize) -> Result<Option<&str>, TemplateError> {
        self.some(position)
            .map(|value| self.as_text(value))
            .transpose()
    }

    /// The string at an index.
    pub(crate) fn text(&self, position: usize) -> Result<&str, TemplateError> {
        self.as_text(self.required(position)?)
    }

    fn as_text<'a>(&self, value: &'a Value) -> Result<&'a str, TemplateError> {
        value.must_be_defined()?;
        value.as_str().ok_or_else(|| {
            let name = value.type_name();
            TemplateError::new(format!(
                "{}() argument must be str, not {name}",
                self.function
            ))
        })
    }
}
