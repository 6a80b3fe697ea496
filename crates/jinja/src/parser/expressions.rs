//! Expressions, in order of increasing precedence.

use super::Parser;
use crate::{
    ast::{
        ArgumentList, ArithmeticOperator, ComparisonOperator, Conditional, Expression, Filter,
        Literal, Slice,
    },
    error::TemplateError,
    lexer::TemplateToken,
};

impl Parser {
    /// Parses an expression, or a tuple of several separated by commas.
    pub(super) fn tuple(&mut self) -> Result<Expression, TemplateError> {
        self.tuple_until(&[], Self::expression)
    }

    /// Like [`Self::tuple`], with elements parsed by `parse`, up to a name in `ends`.
    pub(super) fn tuple_until(
        &mut self,
        ends: &[&str],
        parse: fn(&mut Self) -> Result<Expression, TemplateError>,
    ) -> Result<Expression, TemplateError> {
        let found = self.token().describe();
        let missing = self.failure(format!("expected an expression, got '{found}'"));
        self.some_tuple(ends, parse)?.ok_or(missing)
    }

    /// Like [`Self::tuple_until`], or `None` if there is no expression.
    fn some_tuple(
        &mut self,
        ends: &[&str],
        parse: fn(&mut Self) -> Result<Expression, TemplateError>,
    ) -> Result<Option<Expression>, TemplateError> {
        let (mut items, mut is_tuple) = (Vec::new(), false);
        loop {
            let is_end = matches!(
                self.token(),
                TemplateToken::VariableEnd | TemplateToken::BlockEnd
            ) || self.is_operator(")")
                || ends.iter().any(|end| self.is_name(end));
            if is_end {
                break;
            }
            items.push(parse(self)?);
            if !self.takes_operator(",") {
                break;
            }
            is_tuple = true;
        }
        Ok(if is_tuple {
            Some(Expression::Tuple(items))
        } else {
            items.pop()
        })
    }

    pub(super) fn expression(&mut self) -> Result<Expression, TemplateError> {
        self.deeper(Self::conditional)
    }

    fn conditional(&mut self) -> Result<Expression, TemplateError> {
        let mut then = self.or()?;
        while self.takes_name("if") {
            self.count_operator()?;
            let test = self.or()?;
            let otherwise = if self.takes_name("else") {
                Some(self.expression()?)
            } else {
                None
            };
            then = Expression::Conditional(Box::new(Conditional {
                test,
                then,
                otherwise,
            }));
        }
        Ok(then)
    }

    pub(super) fn or(&mut self) -> Result<Expression, TemplateError> {
        let mut left = self.and()?;
        while self.takes_name("or") {
            self.count_operator()?;
            left = Expression::Or(Box::new(left), Box::new(self.and()?));
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Expression, TemplateError> {
        let mut left = self.not()?;
        while self.takes_name("and") {
            self.count_operator()?;
            left = Expression::And(Box::new(left), Box::new(self.not()?));
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Expression, TemplateError> {
        if self.takes_name("not") {
            let negated = self.deeper(Self::not)?;
            return Ok(Expression::Not(Box::new(negated)));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Expression, TemplateError> {
        let first = self.sum()?;
        let mut rest = Vec::new();
        while let Some(comparison) = self.comparison_operator() {
            rest.push((comparison, self.sum()?));
        }
        Ok(if rest.is_empty() {
            first
        } else {
            Expression::Comparison(Box::new(first), rest)
        })
    }

    fn comparison_operator(&mut self) -> Option<ComparisonOperator> {
        let comparison = match self.token() {
            TemplateToken::Operator("==") => ComparisonOperator::Equal,
            TemplateToken::Operator("!=") => ComparisonOperator::Unequal,
            TemplateToken::Operator("<") => ComparisonOperator::Less,
            TemplateToken::Operator("<=") => ComparisonOperator::AtMost,
            TemplateToken::Operator(">") => ComparisonOperator::Greater,
            TemplateToken::Operator(">=") => ComparisonOperator::AtLeast,
            TemplateToken::Name(name) if name == "in" => ComparisonOperator::In,
            TemplateToken::Name(name) if name == "not" => match self.peek() {
                TemplateToken::Name(name) if name == "in" => {
                    self.next();
                    ComparisonOperator::NotIn
                }
                _ => return None,
            },
            _ => return None,
        };
        self.next();
        Some(comparison)
    }

    /// Parses a left-associative chain of operators of one precedence.
    fn chain(
        &mut self,
        operand: fn(&mut Self) -> Result<Expression, TemplateError>,
        operators: &[(&str, ArithmeticOperator)],
    ) -> Result<Expression, TemplateError> {
        let mut left = operand(self)?;
        loop {
            let found = operators
                .iter()
                .find(|(written, _)| self.is_operator(written));
            let Some((_, operator)) = found else {
                return Ok(left);
            };
            self.next();
            self.count_operator()?;
            let right = operand(self)?;
            left = Expression::Arithmetic(*operator, Box::new(left), Box::new(right));
        }
    }

    fn sum(&mut self) -> Result<Expression, TemplateError> {
        let operators = [
            ("+", ArithmeticOperator::Add),
            ("-", ArithmeticOperator::Subtract),
        ];
        self.chain(Self::concatenation, &operators)
    }

    fn concatenation(&mut self) -> Result<Expression, TemplateError> {
        let first = self.product()?;
        if !self.is_operator("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.takes_operator("~") {
            parts.push(self.product()?);
        }
        Ok(Expression::Concatenation(parts))
    }

    fn product(&mut self) -> Result<Expression, TemplateError> {
        let operators = [
            ("*", ArithmeticOperator::Multiply),
            ("/", ArithmeticOperator::Divide),
            ("//", ArithmeticOperator::FloorDivide),
            ("%", ArithmeticOperator::Modulo),
        ];
        self.chain(Self::power, &operators)
    }

    fn power(&mut self) -> Result<Expression, TemplateError> {
        self.chain(Self::filtered, &[("**", ArithmeticOperator::Power)])
    }

    /// Parses a signed value with its filters and tests.
    fn filtered(&mut self) -> Result<Expression, TemplateError> {
        let mut value = self.signed()?;
        loop {
            value = if self.takes_operator("|") {
                Expression::Filter(Box::new(value), Box::new(self.filter()?))
            } else if self.takes_name("is") {
                self.test(value)?
            } else if self.is_operator("(") {
                Expression::Call(Box::new(value), Box::new(self.arguments()?))
            } else {
                return Ok(value);
            };
            self.count_operator()?;
        }
    }

    fn signed(&mut self) -> Result<Expression, TemplateError> {
        let value = if self.takes_operator("-") {
            Expression::Negative(Box::new(self.deeper(Self::signed)?))
        } else if self.takes_operator("+") {
            Expression::Positive(Box::new(self.deeper(Self::signed)?))
        } else {
            self.primary()?
        };
        self.postfix(value)
    }

    fn primary(&mut self) -> Result<Expression, TemplateError> {
        let value = match self.token().clone() {
            TemplateToken::Name(name) => {
                self.next();
                return Ok(self.named(name));
            }
            TemplateToken::Text(_) => {
                let mut text = String::new();
                while let TemplateToken::Text(part) = self.token() {
                    text.push_str(part);
                    self.next();
                }
                return Ok(Expression::Literal(Literal::Text(text)));
            }
            TemplateToken::Int(number) => Expression::Literal(Literal::Int(number)),
            TemplateToken::Float(number) => Expression::Literal(Literal::Float(number)),
            TemplateToken::Operator("(") => {
                self.next();
                let inside = self.deeper(|parser| parser.some_tuple(&[], Self::expression))?;
                self.expect_operator(")")?;
                return Ok(inside.unwrap_or(Expression::Tuple(Vec::new())));
            }
            TemplateToken::Operator("[") => {
                self.next();
                let items = self.separated("]", Self::expression)?;
                return Ok(Expression::List(items));
            }
            TemplateToken::Operator("{") => {
                self.next();
                let pair = |parser: &mut Self| {
                    let key = parser.expression()?;
                    parser.expect_operator(":")?;
                    Ok((key, parser.expression()?))
                };
                return Ok(Expression::Dict(self.separated("}", pair)?));
            }
            other => return Err(self.failure(format!("unexpected '{}'", other.describe()))),
        };
        self.next();
        Ok(value)
    }

    /// Converts a name to a constant or a variable.
    fn named(&mut self, name: String) -> Expression {
        let literal = match name.as_str() {
            "true" | "True" => Literal::Bool(true),
            "false" | "False" => Literal::Bool(false),
            "none" | "None" => Literal::None,
            _ => {
                self.takes.caller |= name == "caller";
                self.takes.kwargs |= name == "kwargs";
                self.takes.varargs |= name == "varargs";
                return Expression::Name(name);
            }
        };
        Expression::Literal(literal)
    }

    /// Parses comma-separated items up to the operator `end`; a trailing comma is allowed.
    fn separated<T>(
        &mut self,
        end: &'static str,
        mut parse: impl FnMut(&mut Self) -> Result<T, TemplateError>,
    ) -> Result<Vec<T>, TemplateError> {
        let mut items = Vec::new();
        while !self.is_operator(end) {
            items.push(parse(self)?);
            if !self.takes_operator(",") {
                break;
            }
        }
        self.expect_operator(end)?;
        Ok(items)
    }

    fn postfix(&mut self, mut value: Expression) -> Result<Expression, TemplateError> {
        loop {
            value = if self.takes_operator(".") {
                match self.next() {
                    TemplateToken::Name(name) => Expression::Attribute(Box::new(value), name),
                    TemplateToken::Int(position) => {
                        let position = Expression::Literal(Literal::Int(position));
                        Expression::Item(Box::new(value), Box::new(position))
                    }
                    _ => return Err(self.failure("expected name or number")),
                }
            } else if self.takes_operator("[") {
                self.subscript(value)?
            } else if self.is_operator("(") {
                Expression::Call(Box::new(value), Box::new(self.arguments()?))
            } else {
                return Ok(value);
            };
            self.count_operator()?;
        }
    }

    fn subscript(&mut self, value: Expression) -> Result<Expression, TemplateError> {
        let start = if self.is_operator(":") {
            None
        } else {
            Some(self.expression()?)
        };
        match start {
            Some(item) if self.takes_operator("]") => {
                Ok(Expression::Item(Box::new(value), Box::new(item)))
            }
            Some(first) if self.takes_operator(",") => {
                let mut items = vec![first];
                items.extend(self.separated("]", Self::expression)?);
                let tuple = Expression::Tuple(items);
                Ok(Expression::Item(Box::new(value), Box::new(tuple)))
            }
            start => {
                self.expect_operator(":")?;
                let mut bound = || {
                    let is_omitted = self.is_operator(":") || self.is_operator("]");
                    (!is_omitted).then(|| self.expression()).transpose()
                };
                let stop = bound()?;
                let has_step = self.takes_operator(":");
                let step = if has_step && !self.is_operator("]") {
                    Some(self.expression()?)
                } else {
                    None
                };
                self.expect_operator("]")?;
                let slice = Slice { start, stop, step };
                Ok(Expression::Slice(Box::new(value), Box::new(slice)))
            }
        }
    }

    pub(super) fn arguments(&mut self) -> Result<ArgumentList, TemplateError> {
        self.expect_operator("(")?;
        let mut arguments = ArgumentList::default();
        while !self.is_operator(")") {
            self.argument(&mut arguments)?;
            if !self.takes_operator(",") {
                break;
            }
        }
        self.expect_operator(")")?;
        Ok(arguments)
    }

    fn argument(&mut self, arguments: &mut ArgumentList) -> Result<(), TemplateError> {
        let ArgumentList {
            positional,
            named,
            more,
            more_named,
        } = arguments;
        let misplaced = self.failure("invalid syntax for function call expression");
        if self.takes_operator("*") {
            if more.is_some() || more_named.is_some() {
                return Err(misplaced);
            }
            *more = Some(self.expression()?);
        } else if self.takes_operator("**") {
            if more_named.is_some() {
                return Err(misplaced);
            }
            *more_named = Some(self.expression()?);
        } else if let (TemplateToken::Name(name), TemplateToken::Operator("=")) =
            (self.token(), self.peek())
        {
            let name = name.clone();
            if more_named.is_some() {
                return Err(misplaced);
            }
            self.next();
            self.next();
            named.push((name, self.expression()?));
        } else {
            if more.is_some() || more_named.is_some() || !named.is_empty() {
                return Err(misplaced);
            }
            positional.push(self.expression()?);
        }
        Ok(())
    }

    /// Parses the test after `is`.
    fn test(&mut self, value: Expression) -> Result<Expression, TemplateError> {
        let is_negated = self.takes_name("not");
        let name = self.dotted()?;
        let begins_value = match self.token() {
            TemplateToken::Name(name) => !["else", "or", "and"].contains(&name.as_str()),
            TemplateToken::Text(_) | TemplateToken::Int(_) | TemplateToken::Float(_) => true,
            TemplateToken::Operator(operator) => ["[", "{"].contains(operator),
            _ => false,
        };
        let arguments = if self.is_operator("(") {
            self.arguments()?
        } else if begins_value {
            if self.is_name("is") {
                return Err(self.failure("You cannot chain multiple tests with is"));
            }
            let argument = self.primary()?;
            ArgumentList {
                positional: vec![self.postfix(argument)?],
                ..ArgumentList::default()
            }
        } else {
            ArgumentList::default()
        };
        let test = Expression::Test(Box::new(value), Box::new(Filter { name, arguments }));
        Ok(if is_negated {
            Expression::Not(Box::new(test))
        } else {
            test
        })
    }
}
