//! Renderer: evaluates statements and expressions.

use std::{cell::RefCell, rc::Rc, sync::Arc};

use crate::{
    arguments::CallArguments,
    ast::{
        ArgumentList, AssignTarget, ComparisonOperator, Expression, Filter, For, If, Macro, Slice,
        Statement, StatementKind,
    },
    error::TemplateError,
    filters,
    functions::Function,
    limits::{self, RenderBudget},
    loops::Loop,
    operators::{bound, slice_indices, undefined_name},
    scope::Scope,
    tests,
    value::{Dict, Value},
};

/// A macro with the scope of its definition.
pub(crate) struct MacroValue {
    pub(crate) definition: Arc<Macro>,
    scope: Rc<Scope>,
}

/// Control flow after a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Next,
    Continue,
    Break,
}

/// Enclosing scope and nesting depth of a loop.
#[derive(Clone, Copy)]
struct LoopContext<'a> {
    scope: &'a Rc<Scope>,
    depth0: usize,
}

/// Bytes of a scope that a macro keeps until the end of the rendering, without the values of its variables.
const SCOPE_BYTES: usize = 1024;

/// State of one rendering.
#[derive(Default)]
pub(crate) struct Renderer {
    budget: RenderBudget,
    /// Scopes captured by macros and namespaces; both may form reference cycles, which are cleared on drop.
    scopes: RefCell<Vec<Rc<Scope>>>,
    namespaces: RefCell<Vec<Rc<RefCell<Dict>>>>,
}

impl Drop for Renderer {
    fn drop(&mut self) {
        for scope in self.scopes.get_mut() {
            scope.clear();
        }
        for namespace in self.namespaces.get_mut() {
            drop(namespace.take());
        }
    }
}

impl Renderer {
    /// Renders the statements of a template into `text`.
    pub(crate) fn render(
        &self,
        body: &[Statement],
        scope: &Rc<Scope>,
        text: &mut String,
    ) -> Result<(), TemplateError> {
        self.statements(body, scope, text).map(drop)
    }

    fn statements(
        &self,
        body: &[Statement],
        scope: &Rc<Scope>,
        text: &mut String,
    ) -> Result<Flow, TemplateError> {
        for statement in body {
            let flow = self
                .budget
                .deeper(|| self.statement(&statement.kind, scope, text));
            match flow.map_err(|error| error.at(statement.line))? {
                Flow::Next => {}
                flow => return Ok(flow),
            }
        }
        Ok(Flow::Next)
    }

    fn statement(
        &self,
        kind: &StatementKind,
        scope: &Rc<Scope>,
        text: &mut String,
    ) -> Result<Flow, TemplateError> {
        match kind {
            StatementKind::Text(written) => self.print(written, text)?,
            StatementKind::Print(printed) => {
                self.print(&self.value(printed, scope)?.to_text()?, text)?;
            }
            StatementKind::For(definition) => {
                let items = self.value(&definition.items, scope)?.iterate()?;
                return self.run_loop(definition, items, LoopContext { scope, depth0: 0 }, text);
            }
            StatementKind::If(condition) => return self.condition(condition, scope, text),
            StatementKind::Set(target, value) => {
                assign(target, self.value(value, scope)?, scope, scope)?;
            }
            StatementKind::SetBlock {
                target,
                filters,
                body,
            } => {
                let (value, flow) = self.filtered(filters, body, scope)?;
                if flow == Flow::Next {
                    assign(target, value, scope, scope)?;
                }
                return Ok(flow);
            }
            StatementKind::FilterBlock { filters, body } => {
                let (value, flow) = self.filtered(filters, body, scope)?;
                if flow == Flow::Next {
                    self.print(&value.to_text()?, text)?;
                }
                return Ok(flow);
            }
            StatementKind::With { variables, body } => {
                let inner = scope.inner();
                for (target, value) in variables {
                    assign(target, self.value(value, scope)?, &inner, scope)?;
                }
                return self.statements(body, &inner, text);
            }
            StatementKind::Macro(definition) => {
                let value = self.macro_value(definition, scope);
                scope.set(&definition.name, value);
            }
            StatementKind::CallBlock {
                callee,
                arguments,
                caller,
            } => {
                let callee = self.value(callee, scope)?;
                let mut args = self.evaluate_arguments(arguments, scope)?;
                let caller = self.macro_value(caller, scope);
                args.named.push(("caller".into(), caller));
                self.print(&self.call(&callee, args)?.to_text()?, text)?;
            }
            StatementKind::Generation(body) => return self.statements(body, &scope.inner(), text),
            StatementKind::Break => return Ok(Flow::Break),
            StatementKind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn condition(
        &self,
        condition: &If,
        scope: &Rc<Scope>,
        text: &mut String,
    ) -> Result<Flow, TemplateError> {
        for (test, body) in &condition.branches {
            if self.value(test, scope)?.is_true() {
                return self.statements(body, scope, text);
            }
        }
        self.statements(&condition.otherwise, scope, text)
    }

    fn print(&self, written: &str, text: &mut String) -> Result<(), TemplateError> {
        limits::output(text.len() + written.len())?;
        limits::allocate(written.len());
        text.push_str(written);
        Ok(())
    }

    fn macro_value(&self, definition: &Arc<Macro>, scope: &Rc<Scope>) -> Value {
        limits::allocate(SCOPE_BYTES);
        self.scopes.borrow_mut().push(Rc::clone(scope));
        Value::Macro(Rc::new(MacroValue {
            definition: Arc::clone(definition),
            scope: Rc::clone(scope),
        }))
    }

    /// Renders a block and applies filters.
    fn filtered(
        &self,
        filters: &[Filter],
        body: &[Statement],
        scope: &Rc<Scope>,
    ) -> Result<(Value, Flow), TemplateError> {
        let mut text = String::new();
        let flow = self.statements(body, &scope.inner(), &mut text)?;
        let mut value = Value::from(text);
        for filter in filters {
            value = filters::apply(
                &filter.name,
                &value,
                self.evaluate_arguments(&filter.arguments, scope)?,
            )?;
        }
        Ok((value, flow))
    }

    /// Runs a loop.
    fn run_loop(
        &self,
        definition: &Arc<For>,
        items: Vec<Value>,
        context: LoopContext<'_>,
        text: &mut String,
    ) -> Result<Flow, TemplateError> {
        let LoopContext { scope, depth0 } = context;
        let items = Rc::new(self.filter_items(definition, items, scope)?);
        let depth = items.iter().map(Value::depth).max().unwrap_or(0);
        let (mut last_changed, mut has_completed) = (None, false);
        for (index0, item) in items.iter().enumerate() {
            let inner = scope.inner();
            let state = Rc::new(Loop {
                items: Rc::clone(&items),
                index0,
                depth0,
                depth,
                last_changed: RefCell::new(last_changed.take()),
                recursion: definition
                    .is_recursive
                    .then(|| (Arc::clone(definition), Rc::clone(scope))),
            });
            inner.set("loop", Value::Loop(Rc::clone(&state)));
            assign(&definition.target, item.clone(), &inner, scope)?;
            let flow = self.statements(&definition.body, &inner, text);
            last_changed = state.last_changed.take();
            match flow? {
                Flow::Next => has_completed = true,
                Flow::Continue => {}
                Flow::Break => break,
            }
        }
        // As in jinja2, an iteration ended by `continue` or `break` does not count.
        if !has_completed {
            return self.statements(&definition.otherwise, &scope.inner(), text);
        }
        Ok(Flow::Next)
    }

    /// Applies the loop filter.
    fn filter_items(
        &self,
        definition: &For,
        items: Vec<Value>,
        scope: &Rc<Scope>,
    ) -> Result<Vec<Value>, TemplateError> {
        let Some(filter) = &definition.filter else {
            return Ok(items);
        };
        let mut kept = Vec::new();
        for item in items {
            let inner = scope.inner();
            assign(&definition.target, item.clone(), &inner, scope)?;
            if self.value(filter, &inner)?.is_true() {
                kept.push(item);
            }
        }
        Ok(kept)
    }

    fn value(&self, expression: &Expression, scope: &Rc<Scope>) -> Result<Value, TemplateError> {
        let value = self.budget.deeper(|| self.evaluate(expression, scope))?;
        if value.depth() > limits::VALUE_DEPTH {
            let most = limits::VALUE_DEPTH;
            return Err(TemplateError::new(format!(
                "more than {most} nested lists or dictionaries"
            )));
        }
        if let (Value::Namespace(namespace), Expression::Call(..)) = (&value, expression) {
            self.namespaces.borrow_mut().push(Rc::clone(namespace));
        }
        Ok(value)
    }

    fn evaluate(&self, expression: &Expression, scope: &Rc<Scope>) -> Result<Value, TemplateError> {
        let of = |expression: &Expression| self.value(expression, scope);
        let all =
            |expressions: &[Expression]| expressions.iter().map(of).collect::<Result<Vec<_>, _>>();
        Ok(match expression {
            Expression::Literal(literal) => literal.into(),
            Expression::Name(name) => match scope.get(name) {
                Some(value) => value,
                None if name == "self" => {
                    return Err(TemplateError::unsupported("the variable self"));
                }
                None => Function::named(name).map_or_else(|| undefined_name(name), Value::Function),
            },
            Expression::Attribute(object, name) => of(object)?.attribute(name)?,
            Expression::Item(object, item) => {
                let object = of(object)?;
                if matches!(object, Value::Text(_)) {
                    limits::work(object.work())?;
                }
                object.subscript(&of(item)?)?
            }
            Expression::Slice(object, slice) => self.slice(&of(object)?, slice, scope)?,
            Expression::List(items) => Value::list(all(items)?),
            Expression::Tuple(items) => Value::tuple(all(items)?),
            Expression::Dict(pairs) => {
                let mut dict = Dict::default();
                for (key, value) in pairs {
                    dict.insert(of(key)?, of(value)?)?;
                }
                Value::dict(dict)
            }
            Expression::Negative(operand) => of(operand)?.negated()?,
            Expression::Positive(operand) => of(operand)?.plus()?,
            Expression::Not(operand) => Value::Bool(!of(operand)?.is_true()),
            Expression::And(left, right) => {
                let left = of(left)?;
                if left.is_true() { of(right)? } else { left }
            }
            Expression::Or(left, right) => {
                let left = of(left)?;
                if left.is_true() { left } else { of(right)? }
            }
            Expression::Arithmetic(operator, left, right) => {
                of(left)?.arithmetic(*operator, &of(right)?)?
            }
            Expression::Concatenation(parts) => {
                let texts = parts.iter().map(|part| of(part)?.to_text());
                let texts = texts.collect::<Result<Vec<_>, _>>()?;
                limits::text(texts.iter().map(|text| text.len()).sum())?;
                texts.concat().into()
            }
            Expression::Comparison(first, rest) => {
                Value::Bool(self.comparison(first, rest, scope)?)
            }
            Expression::Conditional(conditional) => {
                if of(&conditional.test)?.is_true() {
                    of(&conditional.then)?
                } else if let Some(otherwise) = &conditional.otherwise {
                    of(otherwise)?
                } else {
                    let reason = "the inline if-expression evaluated to false and no else section was defined.";
                    Value::undefined(reason)
                }
            }
            Expression::Call(callee, arguments) => {
                let callee = of(callee)?;
                self.call(&callee, self.evaluate_arguments(arguments, scope)?)?
            }
            Expression::Filter(value, filter) => filters::apply(
                &filter.name,
                &of(value)?,
                self.evaluate_arguments(&filter.arguments, scope)?,
            )?,
            Expression::Test(value, test) => {
                let args = self.evaluate_arguments(&test.arguments, scope)?;
                Value::Bool(tests::holds(&test.name, &of(value)?, args)?)
            }
        })
    }

    /// Chained comparison `first < second < …`, evaluated up to the first that is false.
    fn comparison(
        &self,
        first: &Expression,
        rest: &[(ComparisonOperator, Expression)],
        scope: &Rc<Scope>,
    ) -> Result<bool, TemplateError> {
        let mut left = self.value(first, scope)?;
        for (comparison, right) in rest {
            let right = self.value(right, scope)?;
            if !left.compare(*comparison, &right)? {
                return Ok(false);
            }
            left = right;
        }
        Ok(true)
    }

    fn slice(
        &self,
        object: &Value,
        slice: &Slice,
        scope: &Rc<Scope>,
    ) -> Result<Value, TemplateError> {
        let evaluated = |part: &Option<Expression>| {
            let value = part
                .as_ref()
                .map(|part| self.value(part, scope))
                .transpose()?;
            Ok::<_, TemplateError>(value)
        };
        let (start, stop, step) = (
            evaluated(&slice.start)?,
            evaluated(&slice.stop)?,
            evaluated(&slice.step)?,
        );
        object.must_be_defined()?;
        limits::work(object.work())?;
        let (Some(length), true) = (object.len(), is_sliceable(object)) else {
            let name = object.type_name();
            return Err(TemplateError::new(format!(
                "'{name}' object cannot be sliced"
            )));
        };
        let step = bound(step)?.unwrap_or(1);
        if step == 0 {
            return Err(TemplateError::new("slice step cannot be zero"));
        }
        let positions = slice_indices(length, bound(start)?, bound(stop)?, step);
        Ok(match object {
            Value::Text(text) => {
                let chars: Vec<char> = text.text.chars().collect();
                text.with(
                    &positions
                        .into_iter()
                        .map(|position| chars[position])
                        .collect::<String>(),
                )
            }
            Value::Tuple(tuple) => Value::tuple(
                positions
                    .into_iter()
                    .map(|position| tuple.items[position].clone())
                    .collect(),
            ),
            Value::Range(_) => return Err(TemplateError::unsupported("a slice of a range")),
            other => {
                let items = other.iterate()?;
                Value::list(
                    positions
                        .into_iter()
                        .map(|position| items[position].clone())
                        .collect(),
                )
            }
        })
    }

    fn evaluate_arguments(
        &self,
        arguments: &ArgumentList,
        scope: &Rc<Scope>,
    ) -> Result<CallArguments, TemplateError> {
        let mut args = CallArguments::default();
        for argument in &arguments.positional {
            args.positional.push(self.value(argument, scope)?);
        }
        for (name, argument) in &arguments.named {
            args.named
                .push((name.clone(), self.value(argument, scope)?));
        }
        if let Some(more) = &arguments.more {
            args.positional.extend(self.value(more, scope)?.iterate()?);
        }
        if let Some(more) = &arguments.more_named {
            let Value::Dict(dict) = self.value(more, scope)? else {
                return Err(TemplateError::new("argument after ** must be a mapping"));
            };
            for (name, value) in &dict.pairs {
                limits::work(1 + name.work())?;
                limits::allocate(name.work());
                let named = name
                    .as_str()
                    .ok_or_else(|| TemplateError::new("keywords must be strings"))?;
                args.named.push((named.to_owned(), value.clone()));
            }
        }
        Ok(args)
    }

    fn call(&self, callee: &Value, args: CallArguments) -> Result<Value, TemplateError> {
        callee.must_be_defined()?;
        match callee {
            Value::Macro(called) => self.call_macro(called, args),
            Value::Method(method) => method.call(args),
            Value::Function(function) => function.call(args),
            Value::Loop(enclosing) => {
                let Some((definition, scope)) = &enclosing.recursion else {
                    let message =
                        "The loop must have the 'recursive' marker to be called recursively.";
                    return Err(TemplateError::new(message));
                };
                let args = args.bind("loop", &["iterable"])?;
                let items = args.required(0)?.iterate()?;
                let mut text = String::new();
                let context = LoopContext {
                    scope,
                    depth0: enclosing.depth0 + 1,
                };
                self.run_loop(definition, items, context, &mut text)?;
                Ok(text.into())
            }
            Value::Joiner(joiner) => {
                let (separator, is_used) = joiner.as_ref();
                Ok(if is_used.replace(true) {
                    separator.clone()
                } else {
                    "".into()
                })
            }
            other => Err(TemplateError::new(format!(
                "'{}' object is not callable",
                other.type_name()
            ))),
        }
    }

    fn call_macro(&self, called: &MacroValue, args: CallArguments) -> Result<Value, TemplateError> {
        let definition = &called.definition;
        let CallArguments {
            positional,
            mut named,
        } = args;
        let scope = called.scope.inner();
        let args_left = named.len();
        let mut positional = positional.into_iter();
        let mut take = |name: &str| {
            let position = named.iter().position(|(known, _)| known == name)?;
            Some(named.remove(position).1)
        };
        for (name, default) in &definition.parameters {
            limits::work(1 + args_left)?;
            let value = match (positional.next().or_else(|| take(name)), default) {
                (Some(value), _) => value,
                (None, Some(default)) => self.value(default, &scope)?,
                (None, None) => Value::undefined(format!("parameter '{name}' was not provided")),
            };
            scope.set(name, value);
        }
        let takes = definition.takes;
        let has_caller = definition
            .parameters
            .iter()
            .any(|(name, _)| name == "caller");
        if takes.caller && !has_caller {
            let caller = take("caller").filter(|caller| !matches!(caller, Value::None));
            scope.set(
                "caller",
                caller.unwrap_or_else(|| Value::undefined("No caller defined")),
            );
        }
        let rest: Vec<Value> = positional.collect();
        let name = &definition.name;
        if takes.kwargs {
            let mut dict = Dict::default();
            for (name, value) in named.drain(..) {
                dict.insert(name.into(), value)?;
            }
            scope.set("kwargs", Value::dict(dict));
        } else if let Some((unknown, _)) = named.first() {
            return Err(TemplateError::new(format!(
                "macro '{name}' takes no keyword argument '{unknown}'"
            )));
        }
        if takes.varargs {
            scope.set("varargs", Value::tuple(rest));
        } else if !rest.is_empty() {
            let most = definition.parameters.len();
            return Err(TemplateError::new(format!(
                "macro '{name}' takes not more than {most} argument(s)"
            )));
        }
        let mut text = String::new();
        self.statements(&definition.body, &scope, &mut text)?;
        Ok(text.into())
    }
}

fn is_sliceable(value: &Value) -> bool {
    matches!(
        value,
        Value::Text(_) | Value::List(_) | Value::Tuple(_) | Value::Range(_)
    )
}

/// Assigns in `scope`; namespaces are looked up from `around`.
fn assign(
    target: &AssignTarget,
    value: Value,
    scope: &Rc<Scope>,
    around: &Rc<Scope>,
) -> Result<(), TemplateError> {
    match target {
        AssignTarget::Name(name) => scope.set(name, value),
        AssignTarget::Attribute(name, attribute) => {
            let Some(Value::Namespace(namespace)) = around.get(name) else {
                return Err(TemplateError::new(
                    "cannot assign attribute on non-namespace object",
                ));
            };
            if attribute.starts_with('_') {
                let message = format!(
                    "a namespace cannot store '{attribute}', which begins with an underscore"
                );
                return Err(TemplateError::new(message));
            }
            namespace
                .borrow_mut()
                .insert(attribute.as_str().into(), value)?;
        }
        AssignTarget::Tuple(targets) => {
            let values = value.iterate()?;
            let (expected, got) = (targets.len(), values.len());
            if got < expected {
                return Err(TemplateError::new(format!(
                    "not enough values to unpack (expected {expected}, got {got})"
                )));
            }
            if got > expected {
                return Err(TemplateError::new(format!(
                    "too many values to unpack (expected {expected})"
                )));
            }
            for (target, value) in targets.iter().zip(values) {
                limits::check()?;
                assign(target, value, scope, around)?;
            }
        }
    }
    Ok(())
}
